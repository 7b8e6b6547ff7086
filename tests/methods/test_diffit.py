from __future__ import annotations

from contextlib import AbstractContextManager

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.func import functional_call

from autopeft.backends.native import Native
from autopeft.core.allocation import Allocation
from autopeft.core.budget import Budget
from autopeft.core.contracts import Inserted, Method
from autopeft.core.menu import Option
from autopeft.core.places import places_of
from autopeft.core.scores import Evidence, TensorEvidence
from autopeft.core.site import Catalog, Site
from autopeft.errors import ExportError
from autopeft.methods.diffit import BranchScale, DiffFit, DiffFitShared
from autopeft.models.scan import scan
from autopeft.testing.method_laws import MethodLaws
from autopeft.testing.tiny import tiny_convnet, tiny_vit


class TestLaws(MethodLaws):
    models = ("vit",)

    def make(self) -> Method:
        return DiffFit()


def block(catalog: Catalog, k: int) -> Site:
    return next(g for g in catalog.groups() if g.name == f"block:{k}")


def inserted(model: nn.Module, *blocks: int) -> AbstractContextManager[Inserted]:
    catalog, method = scan(model), DiffFit()
    options = []
    for k in blocks:
        site = block(catalog, k)
        options.append(Option(site.name, "m", 1, method.cost(site, 1), 0.0, places_of(catalog, method, site)))
    return Native().insert(model, catalog, Allocation(tuple(options), Budget(10**6)), {"m": method})


def test_count_on_vit_b() -> None:
    """Per block the biases of four Linears, two norms, two factors."""
    with torch.device("meta"):
        catalog = scan(timm.create_model("vit_base_patch16_224", num_classes=10))
    costs = [DiffFit().cost(block(catalog, k), 1) for k in range(12)]
    assert {c.trainable for c in costs} == {(2304 + 768 + 3072 + 768) + 2 * 2 * 768 + 2}
    assert sum(c.trainable for c in costs) == 119_832
    assert costs[0].tensors == 4 + 2 * 2 + 2
    assert costs[0].entries == 6912 + 3072 + 768 * 768 + 768 * 3072


def parts_of(borrowed: Inserted, k: int) -> dict[str, nn.Module]:
    part = borrowed.named_adapters()[f"block:{k}/m"]
    assert isinstance(part, DiffFitShared)
    return {a.site.name.removeprefix(f"blocks.{k}."): a for a in part.adapters()}


def test_factors_scale_the_residual_branches() -> None:
    """Against the block written out: x + 2 attn(norm1(x)), then x + 0.5 mlp(norm2(x))."""
    model = tiny_vit().double()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    host = model.blocks[1]
    middle = x + 2 * host.attn(host.norm1(x))
    oracle = middle + 0.5 * host.mlp(host.norm2(middle))
    with inserted(model, 1) as borrowed:
        parts = parts_of(borrowed, 1)
        with torch.no_grad():
            parts["attn.proj"].scale.fill_(1.0)
            parts["mlp.fc2"].scale.fill_(-0.5)
        torch.testing.assert_close(host(x), oracle)


def test_biases_join_their_branch_before_the_factor() -> None:
    model = tiny_vit().double()
    host = model.blocks[0].mlp
    x = torch.randn(3, 16, dtype=torch.float64)
    change = torch.randn(16, dtype=torch.float64)
    oracle = 3 * (host(x) + change)
    with inserted(model, 0) as borrowed:
        scale = parts_of(borrowed, 0)["mlp.fc2"]
        with torch.no_grad():
            scale.scale.fill_(2.0)
            scale.bias.copy_(change)
        torch.testing.assert_close(host(x), oracle)
        merged = scale.merge({"weight": host.fc2.weight, "bias": host.fc2.bias})
        torch.testing.assert_close(merged["weight"], 3 * host.fc2.weight)
        torch.testing.assert_close(merged["bias"], 3 * (host.fc2.bias + change))


@pytest.mark.parametrize("settings", [{"init_values": 0.3}, {"qk_norm": True, "qkv_bias": False, "proj_bias": False}])
def test_merges_beside_layer_scales_inner_norms_and_missing_biases(settings: dict[str, object]) -> None:
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=8, patch_size=4, num_classes=4, embed_dim=16, depth=2, num_heads=2, **settings
    ).eval()
    model.double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with inserted(model, 0, 1) as borrowed:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in borrowed.groups()["m"]:
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))
        adapted, state = borrowed.model(x), borrowed.merged_state()
        names = set(parts_of(borrowed, 0))
    assert ("attn.q_norm" in names) == ("qk_norm" in settings)
    assert not any(name.startswith("ls") for name in names)
    assert float((model(x) - adapted).detach().abs().max()) > 0.01
    torch.testing.assert_close(functional_call(model, state, (x,), strict=True), adapted)


def test_gains_are_energies_of_gradients() -> None:
    """By autograd through the inserted parts: biases and norms as they are, a factor in units of the weight's norm."""
    model = tiny_vit().double().requires_grad_(True)
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    model(x).square().sum().backward()
    site = block(scan(model), 1)
    known = {}
    for member, slots in DiffFit().parts(site):
        host = model.get_submodule(member.module)
        tensors = {"weight": host.weight, "bias": host.bias}
        known[member.name] = Evidence(
            member,
            {s: TensorEvidence(t.detach(), t.grad.clone(), t.grad.square()) for s, t in tensors.items()},
        )
        assert slots
    (gain,) = DiffFit().gains(site, Evidence(site, {}, known), (1,))
    total = 0.0
    with inserted(model, 1) as borrowed:
        borrowed.model(x).square().sum().backward()
        for name, adapter in parts_of(borrowed, 1).items():
            for key, p in adapter.named_parameters():
                if key != "scale":
                    total += float(p.grad.square().sum())
                    continue
                host = model.blocks[1].get_submodule(name)
                # The factor moves weight and bias; beside a free bias only its part along the weight is its own.
                along = p.grad.item() - float((host.bias * adapter.bias.grad).sum())
                total += along**2 / float(host.weight.square().sum())
    assert gain == pytest.approx(total, rel=1e-9)


def test_a_projection_that_normalises_its_weight_cannot_be_merged() -> None:
    class Standardised(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, self.weight / self.weight.norm(), self.bias)

    model = tiny_vit()
    model.blocks[0].mlp.fc2 = Standardised(64, 16)
    with inserted(model, 0) as borrowed:
        assert isinstance(parts_of(borrowed, 0)["mlp.fc2"], BranchScale)
        with pytest.raises(ExportError, match="Standardised does not scale with its weight"):
            borrowed.merged_state()


def test_where_it_can_be_used() -> None:
    catalog = scan(tiny_vit())
    used = [s.name for s in (*catalog, *catalog.groups()) if DiffFit().slots(s)]
    assert used == ["block:0", "block:1"]
    conv = scan(tiny_convnet())
    assert not any(DiffFit().slots(s) for s in (*conv, *conv.groups()))


def test_branches_that_end_in_a_norm_have_no_factor() -> None:
    with torch.device("meta"):
        catalog = scan(timm.create_model("swinv2_tiny_window8_256", num_classes=10))
    assert not DiffFit().members(block(catalog, 0))
