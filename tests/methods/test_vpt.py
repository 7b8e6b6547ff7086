from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from autopeft.backends.native import Native
from autopeft.core.allocation import Allocation
from autopeft.core.budget import Budget
from autopeft.core.contracts import Method
from autopeft.core.menu import Option
from autopeft.core.scores import Evidence, TensorEvidence
from autopeft.core.site import Site
from autopeft.errors import UsageError
from autopeft.methods.vpt import VPT
from autopeft.models.scan import scan
from autopeft.testing.method_laws import MethodLaws
from autopeft.testing.tiny import tiny_vit

BLOCK = Site("blocks.0", "blocks.0", "block", (16,), False, 0, "block", ("output", "tokens"))


class TestLaws(MethodLaws):
    models = ("vit",)
    identity = False

    def make(self) -> Method:
        return VPT(dropout=0.1)


def test_a_block_with_prompts() -> None:
    """Behind the tokens or between class token and patches, as the paper has them: the same."""
    model = tiny_vit().double()
    catalog = scan(model)
    site = catalog["blocks.1"]
    option = Option("blocks.1", "m", 3, VPT().cost(site, 3), 0.0, catalog.places(site, ("tokens",)))
    block, x = model.blocks[1], torch.randn(2, 5, 16, dtype=torch.float64)
    with Native().insert(model, catalog, Allocation((option,), Budget(10**6)), {"m": VPT()}) as inserted:
        prompts = inserted.named_adapters()["blocks.1/m"].prompts.detach().expand(2, -1, -1)
        y = block(x)
    longer = block(torch.cat((x[:, :1], prompts, x[:, 1:]), 1))
    torch.testing.assert_close(y, torch.cat((longer[:, :1], longer[:, 4:]), 1))
    assert (y - block(x)).abs().max() > 1e-3


def test_start(build) -> None:
    site = Site("b", "b", "block", (768,), False, 0, "block", ("output", "tokens"))
    prompts = build(VPT(), site, nn.Linear(768, 1), 50).prompts.detach()
    # The paper's bound for patches of 16 x 16: sqrt(6 / (3 * 16 * 16 + 768)).
    bound = (6 / (3 * 16 * 16 + 768)) ** 0.5
    assert bound * 0.99 < prompts.abs().max() <= bound
    assert prompts.std() == pytest.approx(bound / 3**0.5, rel=0.02)


def test_dropout_acts_in_training_alone(build) -> None:
    adapter = build(VPT(dropout=0.5), BLOCK, nn.Linear(16, 16), 10)
    seen = []
    x = torch.randn(2, 5, 16)
    for mode in (True, False):
        adapter.train(mode)
        assert torch.equal(adapter.around(lambda z: seen.append(z) or z, x), x)
    dropped, whole = (z[:, 5:] for z in seen)
    assert torch.equal(whole, adapter.prompts.expand(2, -1, -1))
    assert 0 < int((dropped == 0).sum()) < dropped.numel()


def test_what_is_no_stream_of_tokens_is_refused(build) -> None:
    adapter = build(VPT(), BLOCK, nn.Linear(16, 16), 2)
    x = torch.randn(2, 5, 16)
    for args in ((), (torch.randn(2, 4, 4, 16),), (torch.randn(2, 5, 8),), ("x",)):
        with pytest.raises(UsageError, match=r"put into blocks\.0"):
            adapter.around(lambda *a: a[0], *args)
    for output in (x, (x, x)):
        with pytest.raises(UsageError, match=r"taken out of the output of blocks\.0"):
            adapter.around(lambda _, output=output: output, x)


def test_gains_and_sites() -> None:
    matrix = torch.full((16, 16), 2.0)
    known = Evidence(BLOCK, {"output": TensorEvidence(torch.empty(0), matrix, matrix.square())})
    whole = 16 * 16 * 4.0
    assert VPT().gains(BLOCK, known, (1, 5, 20)) == pytest.approx((whole / 16, 5 * whole / 16, whole))
    assert VPT().gains(BLOCK, Evidence(BLOCK, {}), (1,)) == (0.0,)
    assert not VPT().slots(Site("b", "b", "block", (16,), False, 0, "block", ("output",)))
    assert not VPT().slots(Site("t", "", "tokens", (1, 1, 16), False, 0, "tokens", ("tokens",)))
    assert not VPT().mergeable(BLOCK)


def test_bad_dropout() -> None:
    with pytest.raises(UsageError, match="vpt: dropout"):
        VPT(dropout=1.0)


def test_count_on_a_vit_b() -> None:
    with torch.device("meta"):
        catalog = scan(timm.create_model("vit_base_patch16_224", num_classes=10))
    assert sum(VPT().cost(s, 50).trainable for s in catalog if VPT().slots(s)) == 460_800
