from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autopeft.errors import UsageError
from autopeft.methods.lora import LoRA


def test_hand_worked_change(site_of, build) -> None:
    host = nn.Linear(4, 4)
    adapter = build(LoRA(alpha=2.0), site_of(host), host, 1)
    with torch.no_grad():
        adapter.A.copy_(torch.tensor([[1.0, 2, 0, 0]]))
        adapter.B.copy_(torch.tensor([[3.0], [4], [0], [0]]))
    wanted = torch.zeros(4, 4)
    wanted[:2, :2] = torch.tensor([[6.0, 12], [8, 16]])
    assert torch.equal(adapter.delta()["weight"], wanted)
    assert torch.equal(adapter.branch(torch.tensor([1.0, 1, 5, 5])), torch.tensor([18.0, 24, 0, 0]))


def test_scale_is_alpha_over_rank(site_of, build) -> None:
    host = nn.Linear(16, 16)
    assert build(LoRA(alpha=8.0), site_of(host), host, 4).scale == 2.0
    assert build(LoRA(), site_of(host), host, 4).scale == 1.0


def test_scale_is_alpha_over_the_root_of_the_rank(site_of, build) -> None:
    host = nn.Linear(16, 16)
    assert build(LoRA(alpha=8.0, scaling="sqrt"), site_of(host), host, 4).scale == 4.0
    assert build(LoRA(scaling="sqrt"), site_of(host), host, 4).scale == 0.5
    assert build(LoRA(scaling="sqrt"), site_of(host), host, 1).scale == build(LoRA(), site_of(host), host, 1).scale
    with pytest.raises(UsageError, match="scaling must be one of rank, sqrt, got 'root'"):
        LoRA(scaling="root")


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize(
    "geometry",
    [{}, {"stride": 2, "padding": 1}, {"padding": "same", "dilation": 2}, {"padding": (0, 2), "stride": (1, 2)}],
)
def test_convolution_branch_is_the_dense_change(site_of, build, groups: int, geometry: dict) -> None:
    host = nn.Conv2d(8, 16, 3, groups=groups, **geometry).double()
    adapter = build(LoRA(alpha=3.0), site_of(host), host, 2)
    nn.init.normal_(adapter.B)
    x = torch.randn(2, 8, 7, 9, dtype=torch.float64)
    dense = adapter.delta()["weight"]
    assert dense.shape == host.weight.shape
    # Oracle T13: the rank of what is merged.
    assert torch.linalg.matrix_rank(dense.flatten(1)) == 2
    oracle = F.conv2d(x, dense, None, host.stride, host.padding, host.dilation, groups)
    torch.testing.assert_close(adapter.branch(x), oracle)


def test_low_rank_factors_give_the_change(site_of, build) -> None:
    host = nn.Linear(12, 20)
    adapter = build(LoRA(alpha=6.0), site_of(host, (4, 14)), host, 2)
    nn.init.normal_(adapter.B)
    down, up = adapter.low_rank()
    torch.testing.assert_close(up @ down, adapter.delta()["weight"])
    assert (down.shape, up.shape) == ((2, 12), (10, 2))


def test_gains_are_sums_of_squared_singular_values(site_of, evidence_of) -> None:
    host = nn.Conv2d(6, 20, 3)
    site = site_of(host)
    signal = torch.randn(host.weight.shape)
    known = evidence_of(site, {"weight": host.weight.detach()}, {"weight": signal})
    oracle = torch.linalg.svdvals(signal.flatten(1).double()).square().cumsum(0)
    sizes = LoRA().sizes(site)
    assert LoRA().gains(site, known, sizes) == pytest.approx([float(oracle[r - 1]) for r in sizes])
    assert LoRA().gains(site, known, (20,)) == pytest.approx((float(signal.double().square().sum()),))


def test_cost_of_a_grouped_convolution(site_of) -> None:
    site = site_of(nn.Conv2d(8, 16, 3, groups=4))
    assert LoRA().cost(site, 3).trainable == 3 * (2 * 9 + 16)


def test_not_offered_where_it_is_no_smaller(site_of) -> None:
    assert LoRA().slots(site_of(nn.Linear(2, 2))) == ()
    assert LoRA().sizes(site_of(nn.Linear(3, 3))) == (1,)


@pytest.mark.parametrize("alpha", [0, -1.0, float("nan"), float("inf")])
def test_bad_alpha(alpha: float) -> None:
    with pytest.raises(UsageError, match="alpha"):
        LoRA(alpha=alpha)


@pytest.mark.parametrize("size", [0, 5, True, 2.0])
def test_bad_size(site_of, size: object) -> None:
    with pytest.raises(UsageError, match="size from 1 to 4"):
        LoRA().cost(site_of(nn.Linear(12, 12)), size)


def test_start_is_that_of_a_linear_layer(site_of, build) -> None:
    host = nn.Linear(100, 100)
    a = build(LoRA(), site_of(host), host, 32).A.detach()
    assert a.abs().max() <= 0.1
    assert a.std() == pytest.approx(0.1 / 3**0.5, rel=0.05)
