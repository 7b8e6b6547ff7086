from __future__ import annotations

import math

import pytest
import timm
import torch
from torch import nn

from autopeft.core.contracts import Method
from autopeft.errors import UsageError
from autopeft.methods.ramt import RAMT
from autopeft.models.scan import scan
from autopeft.testing.method_laws import MethodLaws


class TestLaws(MethodLaws):
    def make(self) -> Method:
        return RAMT()


def test_published_count_on_vit_b() -> None:
    """Attention projections and patch embedding, as the paper masks CLIP's image encoder."""
    with torch.device("meta"):
        catalog = scan(timm.create_model("vit_base_patch16_224", num_classes=10))
    sites = [s for s in catalog.candidates() if s.role in ("attn.qkv", "attn.proj", "stem")]
    costs = [RAMT().cost(s, 1) for s in sites]
    assert sum(c.trainable for c in costs) == 28_901_376
    assert sum(c.bits for c in costs) == 28_901_376
    assert sum(c.stored for c in costs) == 28_901_376 // 8
    # What a budget in bytes is charged: a bit per weight, and a header per tensor.
    assert 0 < costs[0].of("bytes") - 768 * 768 // 8 < 256


def test_hand_worked(site_of, build) -> None:
    host = nn.Linear(3, 2)
    with torch.no_grad():
        host.weight.copy_(torch.tensor([[1.0, 2, 3], [4, 5, 6]]))
    adapter = build(RAMT(), site_of(host), host, 1)
    with torch.no_grad():
        adapter.M.copy_(torch.tensor([[0.01, 0.005, 0.0051], [0.0, 1.0, -1.0]]))
    merged = adapter.merge({"weight": host.weight, "bias": host.bias})
    # At the threshold itself a weight goes.
    assert torch.equal(merged["weight"], torch.tensor([[1.0, 0, 3], [0, 5, 0]]))
    assert merged["bias"] is host.bias
    packed = adapter.stored()
    assert {n: (t.dtype, t.tolist()) for n, t in packed.items()} == {"mask": (torch.uint8, [0b10101000])}
    fresh = build(RAMT(), site_of(host), host, 1)
    fresh.load_stored(packed)
    torch.testing.assert_close(fresh.M, torch.tensor([[0.01, 0, 0.01], [0, 0.01, 0]]))
    assert torch.equal(fresh.mask(), adapter.mask())


def test_the_gradient_passes_straight_through(site_of, build) -> None:
    """dL/dM is the gradient of the masked weight times the weight, also where the mask is 0."""
    host = nn.Linear(5, 4).double()
    adapter = build(RAMT(), site_of(host), host, 1)
    with torch.no_grad():
        adapter.M.copy_(0.005 + 0.01 * torch.randn(4, 5))
    x, target = torch.randn(7, 5, dtype=torch.float64), torch.randn(7, 4, dtype=torch.float64)
    masked = (host.weight * adapter.mask()).detach().requires_grad_(True)
    (nn.functional.linear(x, masked, host.bias) - target).square().sum().backward()
    merged = adapter.merge({"weight": host.weight.detach(), "bias": host.bias})
    (nn.functional.linear(x, merged["weight"], host.bias) - target).square().sum().backward()
    assert 0 < int(adapter.mask().sum()) < 20
    torch.testing.assert_close(adapter.M.grad, masked.grad * host.weight.detach())


def test_the_penalty_is_a_norm_of_the_scores(site_of, build) -> None:
    host = nn.Conv2d(3, 4, 3)
    adapter = build(RAMT(), site_of(host), host, 1)
    penalty = adapter.penalty()
    assert penalty.item() == pytest.approx(1e-4 * 0.01 * math.sqrt(108))
    penalty.backward()
    torch.testing.assert_close(adapter.M.grad, torch.full((4, 3, 3, 3), 1e-4 / math.sqrt(108)))
    assert build(RAMT(weight_penalty=0.0), site_of(host), host, 1).penalty() is None


def test_any_number_of_weights_is_packed(site_of, build) -> None:
    for inputs in (1, 7, 8, 9):
        host = nn.Linear(inputs, 3)
        site = site_of(host)
        adapter, fresh = build(RAMT(), site, host, 1), build(RAMT(), site, host, 1)
        nn.init.normal_(adapter.M)
        packed = adapter.stored()
        assert packed["mask"].numel() == RAMT().cost(site, 1).stored == -(-3 * inputs // 8)
        fresh.load_stored(packed)
        assert torch.equal(fresh.mask(), adapter.mask())


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"mask": torch.zeros(2, dtype=torch.uint8)},
        {"mask": torch.zeros(1)},
        {"M": torch.zeros(2, 3)},
    ],
)
def test_a_file_that_does_not_fit_is_refused(site_of, build, tensors: dict[str, torch.Tensor]) -> None:
    host = nn.Linear(3, 2)
    with pytest.raises(UsageError, match=r"uint8 of shape \(1,\)"):
        build(RAMT(), site_of(host), host, 1).load_stored(tensors)


def test_gains_count_what_shrinking_can_gain(site_of, evidence_of) -> None:
    """Shrinking a weight gains where the gradient has its sign: 1 * 2, -3 * -1; not -1 * 2, not at a zero."""
    host = nn.Linear(2, 2)
    value, signal = torch.tensor([[1.0, -1], [-3, 0]]), torch.tensor([[2.0, 2], [-1, 5]])
    known = evidence_of(site_of(host), {"weight": value}, {"weight": signal})
    assert RAMT().gains(site_of(host), known, (1,)) == (5.0,)


@pytest.mark.parametrize(
    "settings", [{"start": 0.005}, {"start": math.inf}, {"threshold": -0.1}, {"weight_penalty": -1.0}]
)
def test_settings_out_of_range(settings: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=next(iter(settings))):
        RAMT(**settings)
