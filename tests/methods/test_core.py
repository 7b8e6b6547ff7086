from __future__ import annotations

import gc
import itertools

import numpy as np
import pytest
import torch
from torch import nn

from autopeft.core.bases import Bases
from autopeft.core.budget import Cost
from autopeft.core.menu import Option
from autopeft.core.scores import Evidence, TensorEvidence
from autopeft.core.site import Place, Site
from autopeft.errors import UsageError
from autopeft.methods import _bases
from autopeft.methods._bases import top_singular
from autopeft.methods._core_bases import drawn_bases
from autopeft.methods._core_shapes import rectangles, shape_sizes
from autopeft.methods.core import Core, CoreAdapter


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


BASES = ("weight", "gradient", "activation", "aligned", "trajectory", "random")


def known_of(site: Site, host: nn.Module) -> Evidence:
    """Evidence with some measured bases of each name."""
    bases = {}
    for seed, name in enumerate(("activation", "aligned", "trajectory")):
        generator = torch.Generator().manual_seed(seed)
        rank = min(site.in_features, site.out_features)
        bases[name] = tuple(
            torch.linalg.qr(torch.randn(n, rank, generator=generator))[0] for n in (site.out_features, site.in_features)
        )
    signal = host.weight.grad
    return Evidence(site, {"weight": TensorEvidence(host.weight.detach(), signal, signal.square(), bases=bases)})


def built(method: Core, site: Site, host: nn.Module, known: Evidence, size: int) -> CoreAdapter:
    indices = method.select(site, known, size)
    bases = method.bases(site, known, size, indices)
    places = (Place(site.name, "weight"),)
    option = Option(site.name, "m", size, method.cost(site, size), 0.0, places, indices, bases)
    return method.build(site, option, host, torch.Generator())


@pytest.mark.parametrize(
    "method",
    [Core(b) for b in BASES]
    + [Core(b, "diagonal") for b in ("weight", "gradient")]
    + [Core(b, "blocks", block=3) for b in ("weight", "trajectory")]
    + [Core(b, "rectangle") for b in ("weight", "random")],
    ids=lambda m: f"{m.basis}-{m.shape}",
)
def test_gain_is_the_squared_norm_of_the_gradient_at_the_start(site_of, method: Core) -> None:
    """On a Linear and on a convolution in groups, against autograd through the adapter itself."""
    for host, shape in ((nn.Linear(10, 12), (20, 10)), (nn.Conv2d(4, 8, 3, groups=2), (2, 4, 6, 6))):
        host.double()
        site = site_of(host)
        x = torch.randn(shape, dtype=torch.float64)
        target = torch.randn_like(host(x))
        (host(x) - target).square().mean().backward()
        known = known_of(site, host)
        sizes = method.sizes(site)
        for size, gain in zip(sizes, method.gains(site, known, sizes), strict=True):
            adapter = built(method, site, host, known, size)
            assert adapter.M.numel() == method.cost(site, size).trainable
            (host(x) + adapter.branch(x) - target).square().mean().backward()
            assert gain == pytest.approx(float(adapter.M.grad.square().sum()), rel=1e-4)


def test_gains_worked_by_hand(site_of, evidence_of) -> None:
    """W = diag(5, 3, 1): its singular vectors are the axes, and the grid of squares is the signal's own."""
    host = nn.Linear(3, 3, bias=False)
    site = site_of(host)
    signal = torch.tensor([[1.0, 2, 0], [3, 4, 0], [0, 5, 1]])
    known = evidence_of(site, {"weight": torch.diag(torch.tensor([5.0, 3, 1]))}, {"weight": signal})
    assert Core().gains(site, known, (1, 2, 3)) == pytest.approx((1, 30, 56))
    assert Core(shape="diagonal").gains(site, known, (1, 2, 3)) == pytest.approx((1, 17, 18))
    assert Core(shape="blocks", block=2).gains(site, known, (1,)) == pytest.approx((30,))
    wide = Core(shape="rectangle")
    assert wide.gains(site, known, (1, 2, 3, 4, 6)) == pytest.approx((1, 10, 10, 30, 55))
    assert wide.select(site, known, 2).values.tolist() == [0, 3]
    assert wide.select(site, known, 6).values.tolist() == [0, 1, 3, 4, 6, 7]
    best = Core("gradient", "diagonal").gains(site, known, (1, 2, 3))
    assert best == pytest.approx(tuple(torch.linalg.svdvals(signal).square().cumsum(0).tolist()))


def test_prices_worked_by_hand(site_of) -> None:
    """Between bases that are stored, 7 x 7 on a 10 x 12 weight stores 49 + 7 (10 + 12) numbers in three tensors."""
    site = site_of(nn.Linear(12, 10))
    assert Core().cost(site, 7) == Cost(49, 49, 32 * 49, 120, 1)
    assert Core("gradient").cost(site, 7) == Cost(49, 203, 32 * 203, 120, 3)
    assert Core("trajectory", "blocks", block=3).cost(site, 2) == Cost(18, 18 + 6 * 22, 32 * 150, 120, 3)
    assert Core(shape="diagonal").cost(site, 7).trainable == 7
    assert Core(shape="rectangle").cost(site, 12).trainable == 12


@pytest.mark.parametrize("side", range(1, 65))
def test_rectangles_of_a_size_fit_in_one_of_the_next(side: int) -> None:
    sizes = shape_sizes("rectangle", 4, side)
    assert sizes[0] == 1
    for small, large in itertools.pairwise(sizes):
        for a, b in rectangles(small, side):
            assert any(a <= c and b <= d for c, d in rectangles(large, side)), (small, large, a, b)
    assert side < 8 or sizes[-1] > side * side / 2


def test_a_rectangle_has_the_sides_that_were_chosen(site_of) -> None:
    host = nn.Linear(9, 7).double()
    site = site_of(host)
    u, v = top_singular(host.weight, None, 7)
    for gradient, sides in ((u[:, :1] @ v.sum(1)[None], (1, 6)), (u.sum(1)[:, None] @ v[:, :1].T, (6, 1))):
        host.weight.grad = gradient.double()
        known = known_of(site, host)
        adapter = built(Core(shape="rectangle"), site, host, known, 6)
        assert tuple(adapter.M.shape) == sides
        with torch.no_grad():
            adapter.M.normal_()
        down, up = adapter.low_rank()
        assert len(down) == min(adapter.M.shape)
        oracle = adapter.U @ adapter.M @ adapter.V.T
        torch.testing.assert_close(up @ down, oracle)
        torch.testing.assert_close(adapter.delta()["weight"], oracle)


def test_a_lora_can_start_from_the_factors(site_of) -> None:
    host = nn.Linear(9, 7).double()
    host.weight.grad = torch.randn_like(host.weight)
    site = site_of(host)
    known = known_of(site, host)
    for method in (Core(), Core(shape="rectangle"), Core(shape="blocks", block=2), Core("aligned")):
        down, up = built(method, site, host, known, method.sizes(site)[-1]).low_rank()
        assert not up.any()
        assert bool(down.any(1).all())


def test_blocks_are_what_they_say(site_of) -> None:
    host = nn.Linear(9, 8).double()
    host.weight.grad = torch.randn_like(host.weight)
    site = site_of(host)
    method = Core(shape="blocks", block=3)
    adapter = built(method, site, host, known_of(site, host), 2)
    with torch.no_grad():
        adapter.M.normal_()
    whole = torch.block_diag(adapter.M[:3], adapter.M[3:])
    torch.testing.assert_close(adapter.delta()["weight"], adapter.U @ whole @ adapter.V.T)
    down, up = adapter.low_rank()
    torch.testing.assert_close(up @ down, adapter.U @ whole @ adapter.V.T)


def test_drawn_bases_do_not_depend_on_the_training_seed(site_of) -> None:
    site = site_of(nn.Linear(80, 70))
    u, v = drawn_bases(site, 0)
    torch.testing.assert_close(u.T @ u, torch.eye(64), atol=1e-5, rtol=0)
    assert (tuple(u.shape), tuple(v.shape)) == ((70, 64), (80, 64))
    assert torch.equal(drawn_bases(site, 0)[0], u)
    assert not torch.allclose(drawn_bases(site, 1)[0], u)


def test_stored_bases_are_saved_and_others_are_not(site_of) -> None:
    host = nn.Linear(10, 12)
    host.weight.grad = torch.randn_like(host.weight)
    site = site_of(host)
    known = known_of(site, host)
    assert set(built(Core("gradient"), site, host, known, 3).state_dict()) == {"M", "U", "V"}
    adapter = built(Core("random"), site, host, known, 3)
    assert set(adapter.state_dict()) == {"M"}
    assert adapter.recomputed == {"U", "V"}


def test_what_cannot_be_built_is_refused(site_of, build) -> None:
    host = nn.Linear(10, 12)
    host.weight.grad = torch.randn_like(host.weight)
    site = site_of(host)
    with pytest.raises(UsageError, match="no price that is known beforehand"):
        Core("gradient", "rectangle")
    with pytest.raises(UsageError, match="basis must be one of"):
        Core("wieght")  # type: ignore[arg-type]  # on purpose
    with pytest.raises(UsageError, match="carries no bases"):
        build(Core("gradient"), site, host, 2)
    with pytest.raises(UsageError, match="no rectangle of 13 entries"):
        Core(shape="rectangle").cost(site, 13)
    with pytest.raises(UsageError, match="form no rectangle"):
        build(Core(shape="rectangle"), site, host, 2, [0, 11])
    bare = Evidence(site, {"weight": TensorEvidence(host.weight, host.weight, host.weight)})
    with pytest.raises(UsageError, match="was not measured"):
        Core("trajectory").gains(site, bare, (1,))
    bases = Bases(np.zeros((12, 2), np.float32), np.zeros((9, 2), np.float32))
    option = Option("host", "m", 2, Core("gradient").cost(site, 2), 0.0, (Place("host", "weight"),), None, bases)
    with pytest.raises(UsageError, match=r"its size needs \(12, 2\) and \(10, 2\)"):
        Core("gradient").build(site, option, host, torch.Generator())
