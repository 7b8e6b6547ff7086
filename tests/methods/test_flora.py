from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autopeft.core.contracts import Method
from autopeft.errors import UsageError
from autopeft.methods.flora import FLoRA
from autopeft.methods.lora import LoRA
from autopeft.testing.method_laws import MethodLaws


class TestLaws(MethodLaws):
    def make(self) -> Method:
        return FLoRA(kernel_rank=None, scale=0.5, start="normal")


def test_hand_worked(site_of, build) -> None:
    host = nn.Conv2d(2, 3, 2)
    adapter = build(FLoRA(kernel_rank=1, scale=2.0), site_of(host), host, 1)
    with torch.no_grad():
        adapter.core.fill_(0.5)
        for factor, values in zip(adapter.factors, ([1.0, 2, 3], [1.0, -1], [1.0, 10], [1.0, 100]), strict=True):
            factor.copy_(torch.tensor(values)[:, None])
    delta = adapter.delta()["weight"]
    assert delta[0, 0].tolist() == [[1, 100], [10, 1000]]
    assert delta[2, 1].tolist() == [[-3, -300], [-30, -3000]]


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("geometry", [{}, {"stride": 2, "padding": 1}, {"padding": "same", "dilation": 2}])
def test_convolution_is_the_tucker_sum(site_of, build, groups: int, geometry: dict) -> None:
    host = nn.Conv2d(8, 16, 3, groups=groups, **geometry).double()
    adapter = build(FLoRA(scale=3.0), site_of(host), host, 3 if groups < 8 else 2)
    nn.init.normal_(adapter.core)
    dense = adapter.delta()["weight"]
    assert dense.shape == host.weight.shape == (16, 8 // groups, 3, 3)
    oracle = 3 * torch.einsum("pquv,op,iq,au,bv->oiab", adapter.core, *adapter.factors)
    torch.testing.assert_close(dense, oracle)
    x = torch.randn(2, 8, 7, 9, dtype=torch.float64)
    conv = F.conv2d(x, oracle, None, host.stride, host.padding, host.dilation, groups)
    torch.testing.assert_close(adapter.branch(x), conv)
    down, up = adapter.low_rank()
    torch.testing.assert_close((up @ down).view(dense.shape), dense)


def test_linear_is_a_core_between_factors(site_of, build) -> None:
    host = nn.Linear(9, 14).double()
    adapter = build(FLoRA(), site_of(host, (2, 12)), host, 2)
    nn.init.normal_(adapter.core)
    u, v = adapter.factors
    x = torch.randn(3, 5, 9, dtype=torch.float64)
    torch.testing.assert_close(adapter.branch(x), x @ v @ adapter.core.T @ u.T)


def test_start(site_of, build) -> None:
    host = nn.Linear(400, 300)
    adapter = build(FLoRA(), site_of(host), host, 50)
    assert not adapter.core.any()
    for factor in adapter.factors:  # gain sqrt(2 / (1 + 3)) over the square root of the fan-in, 50
        assert float(factor.detach().std()) == pytest.approx(math.sqrt(0.5 / 50), rel=0.03)
    normal = build(FLoRA(start="normal"), site_of(host), host, 50)
    assert float(normal.factors[0].detach().std()) == pytest.approx(0.02, rel=0.03)


def test_count_of_the_papers_example(site_of) -> None:
    site = site_of(nn.Conv2d(96, 128, 7))
    assert FLoRA().ranks(site, 16) == (16, 16, 2, 2)
    assert FLoRA().cost(site, 16).trainable == 16 * 16 * 2 * 2 + 96 * 16 + 128 * 16 + 7 * 2 + 7 * 2
    assert FLoRA().cost(site_of(nn.Linear(768, 2304)), 8).trainable == 64 + 8 * (768 + 2304)


def test_count_of_a_depthwise_convolution(site_of) -> None:
    site = site_of(nn.Conv2d(64, 64, 7, groups=64))
    assert FLoRA().ranks(site, 4) == (4, 1, 2, 2)
    assert FLoRA().cost(site, 4).trainable == 4 * 4 + 64 * 4 + 1 + 14 + 14
    assert FLoRA(kernel_rank=None).ranks(site, 4) == (4, 1, 7, 7)


def test_not_offered_where_it_is_no_smaller(site_of) -> None:
    assert FLoRA().slots(site_of(nn.Linear(2, 2))) == ()
    site = site_of(nn.Linear(30, 20))
    assert FLoRA().cost(site, FLoRA().sizes(site)[-1]).trainable < 600


def test_gains(site_of, evidence_of) -> None:
    linear = site_of(nn.Linear(9, 14))
    known = evidence_of(linear, {"weight": torch.zeros(14, 9)}, {"weight": torch.randn(14, 9)})
    assert FLoRA().gains(linear, known, (1, 2, 5)) == pytest.approx(LoRA().gains(linear, known, (1, 2, 5)))
    site = site_of(nn.Conv2d(4, 6, 3))
    u = torch.linalg.qr(torch.randn(6, 2)).Q
    signal = torch.einsum("op,ip,a,b->oiab", u, torch.linalg.qr(torch.randn(4, 2)).Q, torch.ones(3), torch.ones(3))
    known = evidence_of(site, {"weight": torch.zeros(signal.shape)}, {"weight": signal})
    assert FLoRA(kernel_rank=1).gains(site, known, (1, 2, 3)) == pytest.approx((9, 18, 18))


@pytest.mark.parametrize("fields", [{"kernel_rank": 0}, {"scale": 0.0}, {"scale": float("nan")}, {"start": "zero"}])
def test_bad_fields(fields: dict) -> None:
    with pytest.raises(UsageError, match=next(iter(fields))):
        FLoRA(**fields)
