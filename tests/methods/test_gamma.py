from __future__ import annotations

import pytest
import timm.layers
import torch
from torch import nn

from autopeft.core.contracts import Method
from autopeft.core.scores import Evidence, TensorEvidence
from autopeft.core.site import Site
from autopeft.methods.gamma import Gamma
from autopeft.testing.method_laws import MethodLaws


class TestLaws(MethodLaws):
    def make(self) -> Method:
        return Gamma()


def branch(channels: int) -> Site:
    return Site("b.attn", "b.attn", "residual", (channels,), False, 0, "attn", ("output",))


def test_hand_worked(site_of, build) -> None:
    host = nn.Linear(2, 2)
    adapter = build(Gamma(), site_of(host), host, 1)
    with torch.no_grad():
        adapter.scale.copy_(torch.tensor([1.0, -0.5]))
    assert adapter.transform(torch.tensor([[10.0, 20.0]])).tolist() == [[20.0, 10.0]]


def test_small_changes_survive_bfloat16(site_of, build) -> None:
    host = nn.Linear(1, 1)
    adapter = build(Gamma(), site_of(host), host, 1)
    nn.init.constant_(adapter.scale, 0.003)
    y = torch.full((1, 1), 384.0, dtype=torch.bfloat16)
    assert adapter.transform(y).tolist() == [[386.0]]


def test_gains_are_the_energy_of_the_gradient(site_of, build, evidence_of) -> None:
    host = nn.Conv2d(3, 6, 3).double()
    site = site_of(host)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    host(x).sin().mean().backward()
    known = evidence_of(
        site,
        {"weight": host.weight.detach(), "bias": host.bias.detach()},
        {"weight": host.weight.grad.clone(), "bias": host.bias.grad.clone()},
    )
    adapter = build(Gamma(), site, host, 1)
    adapter.transform(host(x)).sin().mean().backward()
    assert Gamma().gains(site, known, (1,)) == pytest.approx((float(adapter.scale.grad.square().sum()),))


def test_gain_behind_a_branch_is_the_energy_of_the_gradient(build) -> None:
    host, site = nn.Linear(5, 5).double(), branch(5)
    y = host(torch.randn(2, 3, 5, dtype=torch.float64)).detach().requires_grad_(True)
    adapter = build(Gamma(), site, host, 1)
    adapter.transform(y).sin().mean().backward()
    gradient = torch.einsum("bnc,bnd->cd", y.grad, y.detach())
    known = Evidence(site, {"output": TensorEvidence(torch.empty(0), gradient, gradient.square())})
    assert Gamma().gains(site, known, (1,)) == pytest.approx((float(adapter.scale.grad.square().sum()),))
    assert Gamma().gains(site, Evidence(site, {}), (1,)) == (0.0,)


def test_what_cannot_be_merged_says_why(site_of, build) -> None:
    host = timm.layers.StdConv2d(3, 6, 3, bias=True)
    assert "StdConv2d" in build(Gamma(), site_of(host), host, 1).obstacle
    assert "residual branch" in build(Gamma(), branch(5), nn.Linear(5, 5), 1).obstacle
    assert not Gamma().mergeable(branch(5))
