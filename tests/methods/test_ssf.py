from __future__ import annotations

import pytest
import timm.layers
import torch
from torch import nn

from autopeft.methods.ssf import SSF

HOSTS = [nn.Linear(5, 6), nn.Conv2d(4, 6, 3, groups=2), nn.LayerNorm(6), nn.BatchNorm2d(6)]


@pytest.mark.parametrize("host", HOSTS)
def test_merge_is_exact(site_of, build, host: nn.Module) -> None:
    host = host.double().eval()
    for p in host.parameters():
        nn.init.normal_(p)
    site = site_of(host)
    shape = {"linear": (2, 3, 5), "conv2d": (2, 4, 5, 5), "layer_norm": (2, 3, 6), "batch_norm": (2, 6, 4, 4)}
    x = torch.randn(shape[site.kind], dtype=torch.float64)
    adapter = build(SSF(), site, host, 1)
    y = host(x)
    assert torch.equal(adapter.transform(y), y)
    for p in adapter.parameters():
        nn.init.normal_(p)
    merged = adapter.merge({"weight": host.weight, "bias": host.bias})
    torch.testing.assert_close(torch.func.functional_call(host, merged, (x,)), adapter.transform(y))


def test_hand_worked(site_of, build) -> None:
    host = nn.Linear(2, 2)
    adapter = build(SSF(), site_of(host), host, 1)
    with torch.no_grad():
        adapter.scale.copy_(torch.tensor([1.0, -0.5]))
        adapter.shift.copy_(torch.tensor([3.0, 4.0]))
    assert adapter.transform(torch.tensor([[10.0, 20.0]])).tolist() == [[23.0, 14.0]]


def test_small_changes_survive_bfloat16(site_of, build) -> None:
    host = nn.Linear(1, 1)
    adapter = build(SSF(), site_of(host), host, 1)
    nn.init.constant_(adapter.scale, 0.003)
    y = torch.full((1, 1), 100.0, dtype=torch.bfloat16)
    assert adapter.transform(y).dtype == torch.bfloat16
    assert adapter.transform(3.84 * y).tolist() == [[386.0]]


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
    adapter = build(SSF(), site, host, 1)
    adapter.transform(host(x)).sin().mean().backward()
    oracle = sum(float(p.grad.square().sum()) for p in adapter.parameters())
    assert SSF().gains(site, known, (1,)) == pytest.approx((oracle,))
    without = evidence_of(site, {"weight": host.weight.detach()}, {"weight": host.weight.grad})
    assert 0 < SSF().gains(site, without, (1,))[0] < oracle


def test_no_bias_cannot_be_merged(site_of, build) -> None:
    host = nn.Conv2d(3, 6, 3, bias=False)
    adapter = build(SSF(), site_of(host), host, 1)
    assert not adapter.mergeable
    assert "no bias" in adapter.obstacle


def test_standardised_convolution_cannot_be_merged(site_of, build) -> None:
    host = timm.layers.StdConv2d(3, 6, 3, bias=True)
    assert "StdConv2d" in build(SSF(), site_of(host), host, 1).obstacle
    same = timm.layers.Conv2dSame(3, 6, 3, bias=True)
    assert build(SSF(), site_of(same), same, 1).mergeable
