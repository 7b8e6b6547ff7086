from __future__ import annotations

import dataclasses

import pytest
import timm
import torch

from autopeft.backends.native import Native
from autopeft.core.allocation import Allocation
from autopeft.core.budget import Budget
from autopeft.core.contracts import Method
from autopeft.core.menu import Option
from autopeft.core.places import places_of
from autopeft.core.scores import Evidence, TensorEvidence
from autopeft.core.site import Site
from autopeft.errors import UsageError
from autopeft.methods.vpt_shallow import VPTShallow
from autopeft.models.scan import scan
from autopeft.testing.method_laws import MethodLaws
from autopeft.testing.tiny import tiny_vit


class TestLaws(MethodLaws):
    models = ("vit",)
    identity = False

    def make(self) -> Method:
        return VPTShallow(dropout=0.1)


def group(names: list[str], *, width: int = 8, name: str = "blocks", tokens: tuple[str, ...] | None = None) -> Site:
    members = tuple(
        Site(
            n,
            n,
            "block",
            (width,),
            False,
            0,
            "block",
            ("output", "tokens") if tokens is None or n in tokens else ("output",),
        )
        for n in names
    )
    return Site(name, "", "group", (len(members),), False, 0, "group", (), members=members)


def test_prompts_travel_through_all_blocks() -> None:
    """Written out: in before the first block, out behind the last one; the blocks between see what became of them."""
    model = tiny_vit().double()
    catalog = scan(model)
    site, method = catalog["blocks"], VPTShallow()
    option = Option("blocks", "m", 5, method.cost(site, 5), 0.0, places_of(catalog, method, site))
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with Native().insert(model, catalog, Allocation((option,), Budget(10**6)), {"m": method}) as inserted:
        prompts = inserted.named_adapters()["blocks/m"].prompts.detach()
        found = inserted.model(images).detach()
    x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    x = torch.cat((x, prompts.expand(2, -1, -1)), 1)
    for block in model.blocks:
        x = block(x)
    oracle = model.forward_head(model.norm(x[:, :-5]))
    torch.testing.assert_close(found, oracle)
    assert (found - model(images)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("site", "count"),
    [
        (group(["blocks.0", "blocks.1", "blocks.2"]), 3),
        (group(["stem.0", "blocks.0", "blocks.1"], tokens=("blocks.0", "blocks.1")), 2),
        (group(["blocks.0", "blocks.1"], name="stream"), 0),
        (group(["blocks.0", "blocks.2"]), 0),
        (group(["blocks.0", "blocks.1", "blocks.2"], tokens=("blocks.0", "blocks.2")), 0),
        (group(["stages.0.0", "stages.1.0"]), 0),
        (group(["blocks.0", "blocks.1"], tokens=("blocks.0",)), 0),
    ],
)
def test_where_it_goes(site: Site, count: int) -> None:
    method = VPTShallow()
    assert [slots for _, slots in method.parts(site)] == [("tokens",)] * count
    assert bool(method.slots(site)) == bool(method.sizes(site)) == bool(count)


def test_blocks_of_several_widths_are_refused() -> None:
    site = group(["blocks.0", "blocks.1"])
    wider = dataclasses.replace(site.members[1], shape=(16,))
    assert not VPTShallow().parts(dataclasses.replace(site, members=(site.members[0], wider)))
    assert not VPTShallow().parts(site.members[0])


def test_gains_look_at_the_first_block() -> None:
    site = group(["blocks.0", "blocks.1"])
    members = {
        m.name: Evidence(m, {"output": TensorEvidence(torch.empty(0), torch.full((8, 8), v), torch.full((8, 8), v))})
        for m, v in zip(site.members, (1.0, 9.0), strict=True)
    }
    assert VPTShallow().gains(site, Evidence(site, {}, members), (2,)) == pytest.approx((2 / 8 * 64,))
    assert VPTShallow().gains(site, Evidence(site, {}, {}), (2,)) == (0.0,)


def test_bad_dropout() -> None:
    with pytest.raises(UsageError, match="vpt_shallow: dropout"):
        VPTShallow(dropout=-0.1)


def test_count_on_a_vit_b() -> None:
    with torch.device("meta"):
        catalog = scan(timm.create_model("vit_base_patch16_224", num_classes=10))
    method = VPTShallow()
    sites = [s for s in catalog.offered() if method.slots(s)]
    assert [s.name for s in sites] == ["blocks"]
    assert method.cost(sites[0], 50).trainable == 50 * 768
