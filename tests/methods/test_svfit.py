from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from autopeft.core.contracts import Method
from autopeft.errors import UsageError
from autopeft.methods._bases import all_singular, top_singular
from autopeft.methods.svfit import SVFit
from autopeft.models.scan import scan
from autopeft.testing.method_laws import MethodLaws


class TestLaws(MethodLaws):
    def make(self) -> Method:
        return SVFit(energy=0.9)


def test_hand_worked(site_of, build) -> None:
    host = nn.Linear(2, 2)
    with torch.no_grad():
        host.weight.copy_(torch.tensor([[0.0, 2.0], [5.0, 0.0]]))
    adapter = build(SVFit(), site_of(host), host, 1)
    with torch.no_grad():
        adapter.values.fill_(3.0)
    assert torch.equal(adapter.delta()["weight"], torch.tensor([[0.0, 0.0], [3.0, 0.0]]))
    assert torch.equal(
        adapter.merge({"weight": host.weight, "bias": host.bias})["weight"], torch.tensor([[0.0, 2.0], [8.0, 0.0]])
    )


def test_only_the_leading_singular_values_move(site_of, build) -> None:
    host = nn.Linear(9, 14)
    adapter = build(SVFit(), site_of(host), host, 4)
    before = torch.linalg.svdvals(host.weight)
    with torch.no_grad():
        adapter.values.copy_(torch.tensor([0.4, 0.3, 0.2, 0.1]))
    after = torch.linalg.svdvals(host.weight + adapter.delta()["weight"])
    wanted = before + torch.tensor([0.4, 0.3, 0.2, 0.1, 0, 0, 0, 0, 0])
    torch.testing.assert_close(after, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [1, 9])
@pytest.mark.parametrize("groups", [1, 2])
def test_convolution_is_the_dense_change(site_of, build, groups: int, size: int) -> None:
    host = nn.Conv2d(4, 10, 3, groups=groups, stride=2, padding=1).double()
    site = site_of(host)
    adapter = build(SVFit(), site, host, size)
    nn.init.normal_(adapter.values)
    x = torch.randn(2, 4, 7, 5, dtype=torch.float64)
    oracle = F.conv2d(x, adapter.delta()["weight"], None, 2, 1, 1, groups)
    torch.testing.assert_close(adapter.branch(x), oracle)
    assert adapter.form == ("branch" if size == groups == 1 else "swap")


def test_gains_are_the_energy_of_the_gradient(site_of, build, evidence_of) -> None:
    host = nn.Linear(10, 12).double()
    site = site_of(host)
    x, target = torch.randn(20, 10, dtype=torch.float64), torch.randn(20, 12, dtype=torch.float64)
    (host(x) - target).square().mean().backward()
    known = evidence_of(site, {"weight": host.weight.detach()}, {"weight": host.weight.grad})
    sizes = SVFit().sizes(site)
    for size, gain in zip(sizes, SVFit().gains(site, known, sizes), strict=True):
        adapter = build(SVFit(), site, host, size)
        (host(x) + F.linear(x, adapter.delta()["weight"]) - target).square().mean().backward()
        assert gain == pytest.approx(float(adapter.values.grad.square().sum()), rel=1e-4)


def test_no_gain_beyond_the_share_of_energy(site_of, evidence_of) -> None:
    host = nn.Linear(4, 4)
    site = site_of(host)
    weight = torch.diag(torch.tensor([9.0, 4.0, 1.0, 1.0]))  # squares 81, 16, 1, 1 of 99
    known = evidence_of(site, {"weight": weight}, {"weight": torch.eye(4)})
    assert SVFit().gains(site, known, (1, 2, 3, 4)) == pytest.approx((1, 2, 3, 4))
    assert SVFit(energy=0.97).gains(site, known, (1, 2, 3, 4)) == pytest.approx((1, 2, 2, 2))
    assert SVFit(energy=97 / 99).gains(site, known, (1, 2, 3, 4)) == pytest.approx((1, 2, 2, 2))
    assert SVFit(energy=1.0).gains(site, known, (1, 2, 3, 4)) == pytest.approx((1, 2, 3, 4))


@pytest.mark.parametrize("energy", [0.0, -0.5, 1.5, float("nan")])
def test_bad_energy(energy: float) -> None:
    with pytest.raises(UsageError, match="energy"):
        SVFit(energy=energy)


def test_sizes_reach_the_smaller_dimension(site_of) -> None:
    assert SVFit().sizes(site_of(nn.Linear(100, 80))) == (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 80)
    assert SVFit().sizes(site_of(nn.Conv2d(16, 16, 3, groups=16))) == (1, 2, 3, 4, 6, 8, 9)
    assert SVFit().sizes(site_of(nn.Linear(1, 1))) == (1,)
    assert SVFit().slots(site_of(nn.LayerNorm(4))) == ()


def test_nothing_but_the_change_is_saved(site_of, build) -> None:
    host = nn.Linear(10, 12)
    adapter = build(SVFit(), site_of(host, (2, 12)), host, 4)
    assert {name: tuple(t.shape) for name, t in adapter.state_dict().items()} == {"values": (4,)}


def test_whole_bases_agree_with_the_leading_ones() -> None:
    weight = torch.randn(90, 70)
    u, values, v = all_singular(weight, (5, 85))
    torch.testing.assert_close((u * values) @ v.T, weight[5:85], atol=1e-5, rtol=1e-5)
    top_u, top_v = top_singular(weight, (5, 85), 64)
    assert torch.equal(top_u, u[:, :64])
    assert torch.equal(top_v, v[:, :64])


def test_count_on_a_vit_b() -> None:
    with torch.device("meta"):
        catalog = scan(timm.create_model("vit_base_patch16_224", num_classes=10))
    sites = [s for s in catalog.candidates("whole") if s.kind == "linear"]
    assert sum(SVFit().cost(s, 16).trainable for s in sites) == 48 * 16
    assert sum(SVFit().cost(s, SVFit().sizes(s)[-1]).trainable for s in sites) == 36_864
