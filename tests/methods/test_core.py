from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

from autopeft.methods import _bases
from autopeft.methods._bases import top_singular
from autopeft.methods.core import Core


@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (9, 3, 2, 2)])
def test_bases_are_singular_vectors(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape)
    matrix = weight.flatten(1)
    u, v = top_singular(weight, None, 5)
    oracle = torch.linalg.svdvals(matrix)[:5]
    torch.testing.assert_close(u.T @ u, torch.eye(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(v.T @ v, torch.eye(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(u.T @ matrix @ v, torch.diag(oracle), atol=1e-5, rtol=1e-5)


def test_sign_is_fixed() -> None:
    weight = torch.randn(10, 6)
    u, v = top_singular(weight, None, 6)
    assert (u.gather(0, u.abs().argmax(0)[None]) > 0).all()
    flipped_u, flipped_v = top_singular(-weight, None, 6)
    torch.testing.assert_close(flipped_u, u)
    torch.testing.assert_close(flipped_v, -v)


def test_bases_are_shared_and_follow_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    decompose = _bases._decompose
    monkeypatch.setattr(_bases, "_decompose", lambda w: calls.append(1) or decompose(w))
    weight = nn.Parameter(torch.randn(8, 8))
    first = top_singular(weight, None, 3)[0].clone()
    top_singular(weight, None, 8)
    top_singular(weight.detach().clone(), None, 2)
    assert len(calls) == 1
    with torch.no_grad():
        weight.copy_(torch.randn(8, 8))
    assert not torch.allclose(top_singular(weight, None, 3)[0], first)
    assert len(calls) == 2
    top_singular(weight, (2, 6), 3)
    assert len(calls) == 3


def test_cache_forgets_dead_tensors() -> None:
    gc.collect()
    before = len(_bases._digests)
    weight = torch.randn(5, 5)
    top_singular(weight, None, 2)
    assert len(_bases._digests) == before + 1
    del weight
    gc.collect()
    assert len(_bases._digests) == before


def test_change_lies_in_the_bases(site_of, build) -> None:
    host = nn.Linear(10, 18).double()
    adapter = build(Core(), site_of(host, (6, 14)), host, 3)
    u, v = top_singular(host.weight, (6, 14), 3)
    assert not adapter.delta()["weight"].any()
    with torch.no_grad():
        adapter.M.copy_(torch.diag(torch.tensor([1.0, 2, 3])))
    delta = adapter.delta()["weight"]
    oracle = sum((i + 1) * torch.outer(u[:, i], v[:, i]) for i in range(3)).double()
    torch.testing.assert_close(delta, oracle)
    x = torch.randn(4, 5, 10, dtype=torch.float64)
    torch.testing.assert_close(adapter.branch(x), x @ delta.T)
    down, up = adapter.low_rank()
    torch.testing.assert_close(up @ down, delta)


def test_nothing_but_the_core_is_saved(site_of, build) -> None:
    host = nn.Linear(10, 12)
    adapter = build(Core(), site_of(host), host, 4)
    assert {name: tuple(t.shape) for name, t in adapter.state_dict().items()} == {"M": (4, 4)}
    assert {name for name, _ in adapter.named_buffers()} == {"U", "V"}


def test_gains_are_the_energy_of_the_gradient_of_the_core(site_of, build, evidence_of) -> None:
    host = nn.Linear(10, 12).double()
    site = site_of(host)
    x, target = torch.randn(20, 10, dtype=torch.float64), torch.randn(20, 12, dtype=torch.float64)
    (host(x) - target).square().mean().backward()
    known = evidence_of(site, {"weight": host.weight.detach()}, {"weight": host.weight.grad})
    gains = Core().gains(site, known, Core().sizes(site))
    for size, gain in zip(Core().sizes(site), gains, strict=True):
        adapter = build(Core(), site, host, size)
        (host(x) + adapter.branch(x) - target).square().mean().backward()
        assert gain == pytest.approx(float(adapter.M.grad.square().sum()), rel=1e-4)
    whole = float(host.weight.grad.square().sum())
    assert gains[-1] <= whole * (1 + 1e-5)


def test_sizes_reach_64_or_the_smaller_dimension(site_of) -> None:
    assert Core().sizes(site_of(nn.Linear(100, 80)))[-3:] == (48, 56, 64)
    assert Core().sizes(site_of(nn.Linear(21, 400))) == (*range(1, 17), 18, 20)
    assert Core().sizes(site_of(nn.Conv2d(4, 16, 3, groups=4))) == tuple(range(1, 10))
