from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from autopeft.errors import UsageError
from autopeft.methods import _sparse
from autopeft.methods._chosen import best_entries
from autopeft.methods.sparse import Sparse

ENTRIES = [0, 3, 7, 8, 13, 21, 22, 29]


@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 3, 5), (2, 2, 3, 5)])
def test_linear_gradients_equal_the_gathered_dense_ones(site_of, build, monkeypatch, shape: tuple[int, ...]) -> None:
    monkeypatch.setattr(_sparse, "_CHUNK", 16)
    host = nn.Linear(5, 6).double()
    adapter = build(Sparse(), site_of(host), host, len(ENTRIES), ENTRIES)
    nn.init.normal_(adapter.values)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    x2 = x.detach().clone().requires_grad_()
    dense = adapter.delta()["weight"].detach().requires_grad_()
    y, oracle = adapter.branch(x), F.linear(x2, dense)
    torch.testing.assert_close(y, oracle)
    up = torch.randn_like(y)
    y.backward(up)
    oracle.backward(up)
    torch.testing.assert_close(adapter.values.grad, dense.grad.flatten()[ENTRIES])
    torch.testing.assert_close(x.grad, x2.grad)


@pytest.mark.parametrize(
    "conv",
    [
        {"kernel_size": 1},
        {"kernel_size": 1, "stride": 2},
        {"kernel_size": 3, "padding": 1, "stride": 2},
        {"kernel_size": 3, "groups": 2, "dilation": 2, "padding": (2, 0)},
        {"kernel_size": 3, "padding": "same"},
    ],
)
def test_convolution_gradients(site_of, build, conv: dict) -> None:
    host = nn.Conv2d(4, 6, **conv).double()
    site = site_of(host)
    entries = [0, 2, 5, 9, site.n_weight - 1]
    adapter = build(Sparse(), site, host, 5, entries)
    nn.init.normal_(adapter.values)
    x = torch.randn(2, 4, 7, 6, dtype=torch.float64, requires_grad=True)
    if adapter.form == "swap":
        assert conv.get("padding") == "same"
        merged = adapter.merge({"weight": host.weight, "bias": host.bias})["weight"]
        assert torch.nonzero((merged != host.weight).flatten()).flatten().tolist() == entries
        return
    dense = adapter.delta()["weight"].detach()
    torch.testing.assert_close(
        adapter.branch(x), F.conv2d(x, dense, None, host.stride, host.padding, host.dilation, host.groups)
    )

    def run(x: Tensor, values: Tensor) -> Tensor:
        return torch.func.functional_call(_Branch(adapter), {"adapter.values": values}, (x,))

    assert torch.autograd.gradcheck(run, (x, adapter.values))


class _Branch(nn.Module):
    def __init__(self, adapter: nn.Module) -> None:
        super().__init__()
        self.adapter = adapter

    def forward(self, x: Tensor) -> Tensor:
        return self.adapter.branch(x)


def test_linear_gradcheck_first_and_second_order(site_of, build) -> None:
    host = nn.Linear(5, 6).double()
    adapter = build(Sparse(), site_of(host), host, len(ENTRIES), ENTRIES)
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    values = torch.randn(len(ENTRIES), dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, values: Tensor) -> Tensor:
        return torch.func.functional_call(_Branch(adapter), {"adapter.values": values}, (x,))

    assert torch.autograd.gradcheck(run, (x, values))
    assert torch.autograd.gradgradcheck(run, (x, values))


class _Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, Tensor):
                self.numel = max(self.numel, t.numel())
        return out


def test_backward_makes_nothing_quadratic_in_the_entries(site_of, build, monkeypatch) -> None:
    monkeypatch.setattr(_sparse, "_CHUNK", 1024)
    host = nn.Linear(48, 64)
    site, n = site_of(host), 3000
    adapter = build(Sparse(), site, host, n, list(range(n)))
    x = torch.randn(10, 48, requires_grad=True)
    with _Largest() as seen:
        adapter.branch(x).sum().backward()
    assert seen.numel <= site.n_weight < n * n


def test_forward_keeps_no_dense_copy(site_of, build) -> None:
    host = nn.Linear(48, 64)
    adapter = build(Sparse(), site_of(host), host, 2000, list(range(2000)))
    x = torch.randn(10, 48, requires_grad=True)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        adapter.branch(x)
    assert max(kept) <= 2000 < host.weight.numel()


@pytest.mark.parametrize("host", [nn.Linear(5, 6), nn.Conv2d(3, 6, 2), nn.LayerNorm(6), nn.BatchNorm2d(6)])
def test_bias_entries(site_of, build, host: nn.Module) -> None:
    site = site_of(host)
    adapter = build(Sparse(slot="bias"), site, host, 2, [1, 4])
    with torch.no_grad():
        adapter.values.copy_(torch.tensor([2.0, 3.0]))
    assert adapter.delta()["bias"].tolist() == [0, 2, 0, 0, 3, 0]
    if adapter.form == "branch":
        x = torch.zeros(1, 5) if site.kind == "linear" else torch.zeros(1, 3, 4, 4)
        change = adapter.branch(x)
        assert (host(x) + change).shape == host(x).shape
        assert change.flatten().tolist() == [0, 2, 0, 0, 3, 0]


def test_ties_are_broken_by_position() -> None:
    score = torch.tensor([1.0, 5, 5, 2, 5, 0])
    assert [best_entries(score, n).tolist() for n in (1, 2, 3, 4, 5, 6)] == [
        [1],
        [1, 2],
        [1, 2, 4],
        [1, 2, 3, 4],
        [0, 1, 2, 3, 4],
        [0, 1, 2, 3, 4, 5],
    ]
    assert best_entries(torch.zeros(3, 4), 5).tolist() == [0, 1, 2, 3, 4]


def test_selection_equals_a_stable_sort(site_of, evidence_of) -> None:
    host = nn.Linear(9, 11)
    site = site_of(host)
    signal, score = torch.randn(11, 9), torch.randint(0, 6, (11, 9)).float()
    known = evidence_of(site, {"weight": host.weight.detach()}, {"weight": signal}, score)
    order = np.lexsort((np.arange(99), -score.flatten().numpy()))
    sizes = Sparse().sizes(site)
    assert sizes == (1, 2, 4, 8, 16, 32, 64, 99)
    gains = Sparse().gains(site, known, sizes)
    for n, gain in zip(sizes, gains, strict=True):
        assert Sparse().select(site, known, n).values.tolist() == sorted(order[:n].tolist())
        assert gain == pytest.approx(float(signal.flatten()[order[:n].copy()].square().sum()), rel=1e-5)


def test_entries_must_be_chosen(site_of, build) -> None:
    host = nn.Linear(5, 6)
    with pytest.raises(UsageError, match="which 2 entries"):
        build(Sparse(), site_of(host), host, 2)


def test_entries_of_another_tensor(site_of, build) -> None:
    host = nn.Linear(5, 6)
    with pytest.raises(UsageError, match=r"30 entries.*go up to 30"):
        build(Sparse(), site_of(host), host, 2, [3, 30])


def test_unknown_slot() -> None:
    with pytest.raises(UsageError, match="slot"):
        Sparse(slot="output")
