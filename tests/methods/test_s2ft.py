from __future__ import annotations

import math

import numpy as np
import pytest
import timm
import torch
from torch import nn

from autopeft.core.contracts import Method
from autopeft.core.menu import Indices, Option
from autopeft.core.site import Place
from autopeft.errors import UsageError
from autopeft.methods.s2ft import S2FT
from autopeft.models.scan import scan
from autopeft.testing.method_laws import MethodLaws


class TestLaws(MethodLaws):
    def make(self) -> Method:
        return S2FT(gamma=0.5, alpha=30.0, importance="real", seed=3)


def option_of(method: S2FT, site, chosen: Indices) -> Option:
    cost = method.cost(site, len(chosen))
    return Option(site.name, "m", len(chosen), cost, 0.0, (Place(site.name, "weight"),), chosen)


def built(method: S2FT, site, host: nn.Module, chosen: Indices) -> nn.Module:
    return method.build(site, option_of(method, site, chosen), host, torch.Generator())


@pytest.mark.parametrize("host", [nn.Linear(7, 5), nn.Conv2d(4, 6, 3, groups=2)])
def test_change_is_the_sum_of_cosines_in_the_new_order(site_of, evidence_of, host: nn.Module) -> None:
    site = site_of(host.double())
    signal = torch.randn(host.weight.shape, dtype=torch.float64)
    known = evidence_of(site, {"weight": host.weight.detach()}, {"weight": signal})
    chosen = S2FT().select(site, known, 6)
    adapter = built(S2FT(alpha=20.0), site, host, chosen)
    assert not adapter.delta()["weight"].any()
    nn.init.normal_(adapter.coefficients)
    k, d = site.out_features, site.in_features
    place_r, place_c = np.argsort(chosen.extra["rows"]), np.argsort(chosen.extra["columns"])
    oracle = torch.zeros(k, d, dtype=torch.float64)
    for i in range(k):
        for j in range(d):
            for c, flat in zip(adapter.coefficients.tolist(), chosen.values, strict=True):
                u, v = divmod(int(flat), d)
                angle = 2 * math.pi * (u * place_r[i] / k + v * place_c[j] / d)
                oracle[i, j] += 20.0 / (k * d) * c * math.cos(angle)
    torch.testing.assert_close(adapter.delta()["weight"], oracle.view(host.weight.shape))


def test_waves_have_norm_1_unless_alpha_says_otherwise(site_of) -> None:
    host = nn.Linear(6, 4).double()
    orders = {"rows": np.array([2, 0, 1, 3]), "columns": np.array([5, 4, 3, 0, 1, 2])}
    adapter = built(S2FT(), site_of(host), host, Indices(np.array([0, 1, 8]), orders))
    norms = []
    for i in range(3):
        with torch.no_grad():
            adapter.coefficients.copy_(torch.eye(3)[i])
        norms.append(float(adapter.delta()["weight"].detach().norm()))
    assert norms == pytest.approx([2**0.5, 1, 1])


def test_smaller_draws_are_part_of_larger_ones(site_of, evidence_of) -> None:
    site = site_of(nn.Linear(9, 8))
    known = evidence_of(site, {"weight": torch.zeros(8, 9)}, {"weight": torch.randn(8, 9)})
    before: set[int] = set()
    for size in S2FT().sizes(site):
        chosen = S2FT().select(site, known, size)
        assert len(chosen) == size
        assert before <= set(chosen.values.tolist())
        before = set(chosen.values.tolist())
        assert sorted(chosen.extra["rows"].tolist()) == list(range(8))
        assert sorted(chosen.extra["columns"].tolist()) == list(range(9))
    mirrors = {(-(f // 9) % 8) * 9 + (-(f % 9)) % 9 for f in before}
    assert len(before | mirrors) == 72  # every frequency or its mirror image
    other = S2FT(seed=1).select(site, known, 8)
    assert other != S2FT().select(site, known, 8)


def test_frequencies_are_drawn_by_importance(site_of, evidence_of) -> None:
    """One wave of the prior has e^gamma times the weight of the noise; over many seeds it comes first in proportion."""
    site = site_of(nn.Linear(3, 1))
    signal = torch.tensor([[1.0, 0.25, 0.25]])  # spectrum: 1.5, 0.75, 0.75
    known = evidence_of(site, {"weight": torch.zeros(1, 3)}, {"weight": signal})
    draws = 500
    for gamma, wanted in ((0.0, 1 / 3), (1.0, 0.5), (2.0, 2 / 3)):  # 2^gamma to two mirror images of 1
        mean = sum(S2FT(gamma=gamma, seed=s).select(site, known, 1).values[0] == 0 for s in range(draws)) / draws
        assert mean == pytest.approx(wanted, abs=3.5 * 0.5 / draws**0.5)


@pytest.mark.parametrize("importance", ["magnitude", "real"])
def test_gains_are_the_energy_of_the_gradient(site_of, evidence_of, importance: str) -> None:
    host = nn.Linear(7, 6).double()
    site = site_of(host)
    x, target = torch.randn(20, 7, dtype=torch.float64), torch.randn(20, 6, dtype=torch.float64)
    (host(x) - target).square().mean().backward()
    method = S2FT(importance=importance)
    known = evidence_of(site, {"weight": host.weight.detach()}, {"weight": host.weight.grad.clone()})
    sizes = method.sizes(site)
    for size, gain in zip(sizes, method.gains(site, known, sizes), strict=True):
        chosen = method.select(site, known, size)
        adapter = built(method, site, host, chosen)
        weight = host.weight.detach() + adapter.delta()["weight"]
        (nn.functional.linear(x, weight, host.bias) - target).square().mean().backward()
        own_mirror = torch.tensor([f in (0, 21) for f in chosen.values])  # u = 0 or 3 and v = 0 have norm sqrt(2)
        squares = adapter.coefficients.grad.square() / torch.where(own_mirror, 2.0, 1.0)
        assert gain == pytest.approx(float(squares.sum()))


def test_a_smooth_prior_is_caught_by_few_waves(site_of, evidence_of) -> None:
    host = nn.Linear(48, 64)
    site = site_of(host)
    generator = torch.Generator().manual_seed(0)
    i, j = torch.linspace(0, 1, 64)[:, None], torch.linspace(0, 1, 48)[None]
    signal = torch.cos(math.pi * i) * torch.cos(2 * math.pi * j)
    signal = signal[torch.randperm(64, generator=generator)][:, torch.randperm(48, generator=generator)]
    known = evidence_of(site, {"weight": torch.zeros(64, 48)}, {"weight": signal})
    whole = float(signal.square().sum())
    drawn = S2FT(gamma=4.0, importance="real").gains(site, known, (64,))[0]
    unguided = S2FT(gamma=0.0).gains(site, known, (64,))[0]
    assert unguided < 0.1 * whole
    assert drawn > 0.4 * whole


def test_zero_signal(site_of, evidence_of) -> None:
    site = site_of(nn.Linear(5, 4))
    known = evidence_of(site, {"weight": torch.zeros(4, 5)}, {"weight": torch.zeros(4, 5)})
    assert S2FT().gains(site, known, (1, 4)) == (0.0, 0.0)
    assert len(S2FT().select(site, known, 4)) == 4


def test_what_is_stored(site_of, evidence_of) -> None:
    host = nn.Linear(9, 8)
    site = site_of(host)
    known = evidence_of(site, {"weight": host.weight.detach()}, {"weight": torch.randn(8, 9)})
    adapter = built(S2FT(), site, host, S2FT().select(site, known, 4))
    stored = {name: (tuple(t.shape), t.dtype) for name, t in adapter.stored().items()}
    assert stored == {
        "coefficients": ((4,), torch.float32),
        "index": ((4,), torch.int32),
        "rows": ((8,), torch.int32),
        "columns": ((9,), torch.int32),
    }
    assert [p.shape for p in adapter.parameters()] == [(4,)]
    cost = S2FT().cost(site, 4)
    assert (cost.trainable, cost.stored, cost.bits, cost.tensors) == (4, 25, 800, 4)


@pytest.mark.parametrize(
    ("values", "extra"),
    [
        ([0, 1], {}),
        ([0, 1], {"rows": np.arange(4)}),
        ([0, 20], {"rows": np.arange(4), "columns": np.arange(5)}),
        ([0, 1], {"rows": np.array([0, 1, 2, 2]), "columns": np.arange(5)}),
        ([0, 1], {"rows": np.arange(4), "columns": np.arange(4)}),
    ],
)
def test_foreign_choices_are_refused(site_of, values: list[int], extra: dict) -> None:
    host = nn.Linear(5, 4)
    with pytest.raises(UsageError, match="frequencies"):
        built(S2FT(), site_of(host), host, Indices(np.array(values), extra))


def test_nothing_chosen(site_of, build) -> None:
    host = nn.Linear(5, 4)
    with pytest.raises(UsageError, match="choose them with `select`"):
        build(S2FT(), site_of(host), host, 2)


@pytest.mark.parametrize("fields", [{"gamma": -1.0}, {"alpha": 0.0}, {"importance": "phase"}])
def test_bad_fields(fields: dict) -> None:
    with pytest.raises(UsageError, match=next(iter(fields))):
        S2FT(**fields)


def test_count_on_a_vit_b() -> None:
    with torch.device("meta"):
        catalog = scan(timm.create_model("vit_base_patch16_224", num_classes=10))
    sites = [s for s in catalog.candidates("whole") if s.kind == "linear"]
    assert sum(S2FT().cost(s, 3_000).trainable for s in sites) == 144_000
    assert sum(S2FT().cost(s, 3_000).stored for s in sites) == 288_000 + 147_456
