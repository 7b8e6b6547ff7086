from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from autopeft.core.contracts import Method
from autopeft.methods.svdiff import SVDiff
from autopeft.models.scan import scan
from autopeft.testing.method_laws import MethodLaws


class TestLaws(MethodLaws):
    def make(self) -> Method:
        return SVDiff()


class TestLawsWithNorms(MethodLaws):
    def make(self) -> Method:
        return SVDiff(norms=True)


@pytest.mark.parametrize("host", [nn.LayerNorm(2), nn.BatchNorm2d(2)])
def test_a_norm_has_one_singular_value(site_of, build, evidence_of, host: nn.Module) -> None:
    site = site_of(host)
    assert SVDiff().sizes(site) == ()
    assert SVDiff(norms=True).cost(site, 1).trainable == 1
    with torch.no_grad():
        host.weight.copy_(torch.tensor([3.0, 4.0]))
    adapter = build(SVDiff(norms=True), site, host, 1)
    with torch.no_grad():
        adapter.shift.fill_(10.0)
    torch.testing.assert_close(adapter.merge({"weight": host.weight})["weight"], torch.tensor([9.0, 12.0]))
    assert adapter.low_rank() is None
    # The gradient (1, 2) along (3, 4) / 5 is 11 / 5.
    known = evidence_of(site, {"weight": host.weight.detach()}, {"weight": torch.tensor([1.0, 2.0])})
    assert SVDiff(norms=True).gains(site, known, (1,)) == pytest.approx((4.84,))


def test_hand_worked(site_of, build) -> None:
    host = nn.Linear(2, 2)
    with torch.no_grad():
        host.weight.copy_(torch.diag(torch.tensor([5.0, 2.0])))
    adapter = build(SVDiff(), site_of(host), host, 1)
    with torch.no_grad():
        adapter.shift.copy_(torch.tensor([1.5, -3.0]))
    merged = adapter.merge({"weight": host.weight, "bias": host.bias})["weight"]
    assert torch.equal(merged, torch.diag(torch.tensor([6.5, 0.0])))


def test_weight_has_the_shifted_spectrum(site_of, build) -> None:
    host = nn.Conv2d(3, 12, 2).double()
    adapter = build(SVDiff(), site_of(host), host, 1)
    singular = torch.linalg.svdvals(host.weight.flatten(1))
    assert not adapter.delta()["weight"].any()
    with torch.no_grad():
        adapter.shift.uniform_(0, 1)
    after = torch.linalg.svdvals((host.weight + adapter.delta()["weight"]).flatten(1))
    torch.testing.assert_close(after, (singular + adapter.shift).sort(descending=True).values, atol=1e-6, rtol=1e-6)


def test_gain_is_the_energy_of_the_gradient(site_of, build, evidence_of) -> None:
    host = nn.Linear(10, 6).double()
    with torch.no_grad():
        host.weight[5] = 0.0  # a singular value of zero cannot be trained
    site = site_of(host)
    x, target = torch.randn(20, 10, dtype=torch.float64), torch.randn(20, 6, dtype=torch.float64)
    (host(x) - target).square().mean().backward()
    known = evidence_of(site, {"weight": host.weight.detach()}, {"weight": host.weight.grad.clone()})
    adapter = build(SVDiff(), site, host, 1)
    (nn.functional.linear(x, host.weight + adapter.delta()["weight"], host.bias) - target).square().mean().backward()
    gradient = adapter.shift.grad
    assert (gradient[:5] != 0).all()
    assert gradient[5] == 0
    assert SVDiff().gains(site, known, (1,))[0] == pytest.approx(float(gradient.square().sum()), rel=1e-4)


def test_zero_weight_gains_nothing(site_of, build, evidence_of) -> None:
    host = nn.Linear(3, 4)
    nn.init.zeros_(host.weight)
    known = evidence_of(site_of(host), {"weight": host.weight.detach()}, {"weight": torch.ones(4, 3)})
    assert SVDiff().gains(site_of(host), known, (1,)) == (0.0,)


def test_count_on_a_vit_b() -> None:
    with torch.device("meta"):
        catalog = scan(timm.create_model("vit_base_patch16_224", num_classes=10))
    sites = [s for s in catalog.candidates("whole") if s.kind == "linear"]
    assert sum(SVDiff().cost(s, 1).trainable for s in sites) == 36_864
    assert SVDiff().cost(catalog["patch_embed.proj"], 1).trainable == 768
