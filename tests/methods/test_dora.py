from __future__ import annotations

import peft
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from autopeft.core.contracts import Method
from autopeft.errors import UsageError
from autopeft.methods.dora import DoRA
from autopeft.models.scan import scan
from autopeft.testing.method_laws import MethodLaws


class TestLaws(MethodLaws):
    def make(self) -> Method:
        return DoRA(alpha=2.0, detach_norm=False)


def test_hand_worked(site_of, build) -> None:
    host = nn.Linear(4, 4)
    with torch.no_grad():
        host.weight.zero_()
        host.weight[0, 0] = 2.0
        host.weight[1, 1] = 1.0
    adapter = build(DoRA(), site_of(host), host, 1)
    with torch.no_grad():
        adapter.A.copy_(torch.tensor([[1.0, 0, 0, 0]]))
        adapter.B.copy_(torch.tensor([[1.0], [1.0], [0.0], [0.0]]))
        adapter.magnitude.copy_(torch.tensor([3.0, 0.0, 1.0, 0.0]))
    merged = adapter.merge({"weight": host.weight, "bias": host.bias})["weight"]
    half = 0.5**0.5
    wanted = torch.tensor([[5.0, 0, 0, 0], [half, half, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    torch.testing.assert_close(merged, wanted)


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_trains_as_peft_does(site_of, build, kind: str) -> None:
    host = nn.Linear(10, 12) if kind == "linear" else nn.Conv2d(4, 12, 3, stride=2, padding=1)
    x = torch.randn(6, 10) if kind == "linear" else torch.randn(6, 4, 7, 7)
    config = peft.LoraConfig(target_modules=["0"], r=2, lora_alpha=6, use_dora=True, lora_dropout=0.0)
    adapter = build(DoRA(alpha=6.0), site_of(host), host, 2)
    theirs = peft.get_peft_model(nn.Sequential(host), config)
    layer = theirs.base_model.model[0]
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    length = layer.lora_magnitude_vector["default"].weight
    with torch.no_grad():
        down.copy_(adapter.A.view(down.shape))
    torch.testing.assert_close(length.flatten(), adapter.norm)
    pairs = [(adapter.A, down), (adapter.B, up), (adapter.magnitude, length)]
    weight, bias = layer.base_layer.weight, layer.base_layer.bias
    target = torch.randn(())
    for _ in range(5):
        tensors = {"weight": weight, "bias": bias}
        changed = adapter.merge(tensors)["weight"]
        y = F.linear(x, changed, bias) if kind == "linear" else F.conv2d(x, changed, bias, 2, 1)
        wanted = theirs(x)
        torch.testing.assert_close(y, wanted, atol=1e-6, rtol=1e-6)
        for out in (y, wanted):
            (out - target).square().mean().backward()
        for mine, other in pairs:
            torch.testing.assert_close(mine.grad.view(other.shape), other.grad, atol=1e-6, rtol=1e-5)
            with torch.no_grad():
                for p in (mine, other):
                    p -= 0.1 * p.grad
                    p.grad = None
    assert adapter.B.abs().min() > 1e-4
    assert adapter.magnitude.abs().max() > 1e-4


def test_detaching_leaves_the_norm_out_of_the_gradient(site_of, build) -> None:
    host = nn.Linear(5, 6).double()
    grads = {}
    for detach in (True, False):
        adapter = build(DoRA(detach_norm=detach), site_of(host), host, 1)
        nn.init.constant_(adapter.B, 0.3)
        merged = adapter.merge({"weight": host.weight, "bias": host.bias})["weight"]
        (merged * torch.arange(30.0).view(6, 5)).sum().backward()
        grads[detach] = adapter.B.grad
        direction = (host.weight + adapter.B @ adapter.A).detach()
        outer = torch.arange(30.0, dtype=torch.float64).view(6, 5)
        ratio = (adapter.norm / torch.linalg.vector_norm(direction, dim=1))[:, None]
        if not detach:  # the part along the direction cannot change the row
            unit = direction / torch.linalg.vector_norm(direction, dim=1, keepdim=True)
            outer = outer - (outer * unit).sum(1, keepdim=True) * unit
        torch.testing.assert_close(grads[detach], (ratio * outer) @ adapter.A.detach().T)
    assert not torch.allclose(grads[True], grads[False])


def test_rows_have_the_trained_lengths(site_of, build) -> None:
    host = nn.Conv2d(4, 8, 3, groups=2).double()
    adapter = build(DoRA(), site_of(host), host, 1)
    nn.init.normal_(adapter.B)
    with torch.no_grad():
        adapter.magnitude.copy_(torch.arange(8.0))
    merged = adapter.merge({"weight": host.weight, "bias": host.bias})["weight"]
    found = torch.linalg.vector_norm(merged.flatten(1), dim=1)
    torch.testing.assert_close(found, torch.linalg.vector_norm(host.weight.flatten(1), dim=1) + torch.arange(8.0))


def test_a_row_of_zeros_stays_finite(site_of, build) -> None:
    host = nn.Linear(6, 6)
    with torch.no_grad():
        host.weight[2] = 0.0
    for detach in (True, False):
        adapter = build(DoRA(detach_norm=detach), site_of(host), host, 1)
        merged = adapter.merge({"weight": host.weight, "bias": host.bias})["weight"]
        torch.testing.assert_close(merged, host.weight, atol=1e-7, rtol=1e-6)
        merged.square().sum().backward()
        assert all(p.grad.isfinite().all() for p in adapter.parameters())


def test_gains_are_lengths_and_the_best_of_the_rest(site_of, evidence_of) -> None:
    site = site_of(nn.Linear(4, 3))
    value = torch.eye(3, 4)
    signal = torch.tensor([[2.0, 0, 0, 5.0], [0, 3.0, 0, 0], [4.0, 0, 1.0, 0]])
    # Along the rows: 4 + 9 + 1. The rest has singular values 5 and 4.
    known = evidence_of(site, {"weight": value}, {"weight": signal})
    assert DoRA().gains(site, known, (1, 2, 3)) == pytest.approx((14 + 25, 14 + 41, 14 + 41))


def test_scale_with_the_root_of_the_rank(site_of, build) -> None:
    host = nn.Linear(16, 12)
    assert build(DoRA(alpha=6.0, scaling="sqrt"), site_of(host), host, 4).scale == 3.0
    assert build(DoRA(alpha=6.0), site_of(host), host, 4).scale == 1.5


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan")])
def test_bad_alpha(alpha: float) -> None:
    with pytest.raises(UsageError, match="alpha"):
        DoRA(alpha=alpha)


def test_count_on_a_vit_b() -> None:
    with torch.device("meta"):
        catalog = scan(timm.create_model("vit_base_patch16_224", num_classes=10))
    sites = [s for s in catalog.candidates("whole") if s.kind == "linear"]
    assert sum(DoRA().cost(s, 8).trainable for s in sites) == 8 * 147_456 + 82_944
    sites = [s for s in catalog.candidates("slices") if s.role in ("attn.q", "attn.v")]
    assert sum(DoRA().cost(s, 4).trainable for s in sites) == 4 * 36_864 + 24 * 768
