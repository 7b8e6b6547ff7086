"""Adapters behind matrices and behind blocks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autopeft.core.scores import Evidence, TensorEvidence
from autopeft.core.site import Site
from autopeft.methods.block_adapter import BlockAdapter
from autopeft.methods.bottleneck import BottleneckAdapter

BLOCK = Site("blocks.0", "blocks.0", "block", (6,), False, 0, "block", ("output",), channel_axis=1)


@pytest.mark.parametrize("axis", [1, -1])
def test_transform_against_plain_layers(build, axis: int) -> None:
    site = Site("b", "b", "block", (6,), False, 0, "block", ("output",), channel_axis=axis)
    host = nn.Conv2d(6, 6, 1).double()
    adapter = build(BlockAdapter(), site, host, 2)
    for p in adapter.parameters():
        nn.init.normal_(p)
    down, up = nn.Linear(6, 2).double(), nn.Linear(2, 6).double()
    down.load_state_dict({"weight": adapter.down_weight, "bias": adapter.down_bias})
    up.load_state_dict({"weight": adapter.up_weight, "bias": adapter.up_bias})
    y = torch.randn(2, 6, 6, 6, dtype=torch.float64)
    last = y.permute(0, 2, 3, 1) if axis == 1 else y
    oracle = last + up(F.gelu(down(last)))
    oracle = oracle.permute(0, 3, 1, 2) if axis == 1 else oracle
    torch.testing.assert_close(adapter.transform(y), oracle)


def test_cannot_be_merged(site_of, build) -> None:
    host = nn.Linear(20, 20)
    assert not build(BottleneckAdapter(), site_of(host), host, 2).mergeable


def test_block_cost_and_sizes() -> None:
    assert BlockAdapter().sizes(BLOCK) == (1, 2)
    assert BlockAdapter().cost(BLOCK, 2).trainable == 2 * 6 * 2 + 2 + 6


@pytest.mark.parametrize("shape", [(30, 8), (8, 30)])
def test_gains_against_the_definition(site_of, evidence_of, shape: tuple[int, int]) -> None:
    host = nn.Linear(shape[1], shape[0]).double()
    site = site_of(host)
    x = torch.randn(50, shape[1], dtype=torch.float64)
    y = host(x)
    y.retain_grad()
    y.sin().mean().backward()
    known = evidence_of(
        site,
        {"weight": host.weight.detach(), "bias": host.bias.detach()},
        {"weight": host.weight.grad, "bias": host.bias.grad},
    )
    matrix = y.grad.T @ y.detach()
    energies = torch.linalg.svdvals(matrix).square().cumsum(0) / 4
    shift = float(y.grad.sum(0).square().sum())
    sizes = BottleneckAdapter().sizes(site)
    assert sizes
    oracle = [float(energies[r - 1]) + shift for r in sizes]
    assert BottleneckAdapter().gains(site, known, sizes) == pytest.approx(oracle, rel=1e-6)


def test_best_down_projection_gets_the_predicted_gradient(site_of, build, evidence_of) -> None:
    """With D the best directions and small inputs, the gradient of U has the predicted energy."""
    host = nn.Linear(8, 12).double()
    site = site_of(host)
    with torch.no_grad():
        host.weight.mul_(1e-3)
        host.bias.mul_(1e-3)
    x, pull = torch.randn(40, 8, dtype=torch.float64), torch.randn(40, 12, dtype=torch.float64)
    (host(x) * pull).sum().backward()
    known = evidence_of(
        site,
        {"weight": host.weight.detach(), "bias": host.bias.detach()},
        {"weight": host.weight.grad, "bias": host.bias.grad},
    )
    adapter = build(BottleneckAdapter(), site, host, 2)
    matrix = pull.T @ host(x).detach()
    with torch.no_grad():
        adapter.down_weight.copy_(torch.linalg.svd(matrix).Vh[:2])
    (adapter.transform(host(x).detach()) * pull).sum().backward()
    energy = float(adapter.up_weight.grad.square().sum() + adapter.up_bias.grad.square().sum())
    assert BottleneckAdapter().gains(site, known, (2,))[0] == pytest.approx(energy, rel=1e-2)


def test_block_gains_need_evidence_on_the_output() -> None:
    assert BlockAdapter().gains(BLOCK, Evidence(BLOCK, {}), (1, 2)) == (0.0, 0.0)
    matrix = torch.diag(torch.tensor([1.0, 4, 2, 0, 0, 0]))
    known = Evidence(BLOCK, {"output": TensorEvidence(torch.empty(0), matrix, matrix.square())})
    assert BlockAdapter().gains(BLOCK, known, (1, 2)) == (4.0, 5.0)
