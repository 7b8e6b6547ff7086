from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autopeft.core.contracts import Method
from autopeft.core.menu import Indices, Option
from autopeft.core.scores import Evidence, TensorEvidence
from autopeft.core.site import Place, Site
from autopeft.errors import UsageError
from autopeft.methods._dense_gradient import DenseGradient
from autopeft.methods.sparse_pool import SparsePool, SparsePoolShared
from autopeft.models.scan import scan
from autopeft.testing._method_cases import ground_of
from autopeft.testing.method_laws import MethodLaws


class TestLaws(MethodLaws):
    def make(self) -> Method:
        return SparsePool()


class TestLawsOfARandomStart(MethodLaws):
    dtypes = (torch.float32,)

    def make(self) -> Method:
        return SparsePool(start="random")


class _Padded(nn.Conv2d):
    """Not plain: its forward is its own."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, padding=1)


class _Three(nn.Module):
    """A Linear, a convolution, and one that must be swapped."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(3, 2, bias=False)
        self.two = nn.Conv2d(2, 4, 3, padding=1, groups=2, bias=False)
        self.three = _Padded(2, 2, 3, bias=False)


def _site() -> Site:
    members = (
        Site("one", "one", "linear", (2, 3), False, 0, "fc", ("weight",)),
        Site("two", "two", "conv2d", (4, 1, 3, 3), False, 0, "conv", ("weight",), groups=2, channel_axis=1),
        Site("three", "three", "conv2d", (2, 2, 3, 3), False, 0, "conv", ("weight",), channel_axis=1),
    )
    return Site("*", "", "group", (3,), False, 0, "group", (), members=members)


def _built(method: SparsePool, position: list[int]) -> SparsePoolShared:
    return SparsePoolShared(_site(), method.members(_site()), _Three().double(), torch.tensor(position), method)


def _loss(shared: SparsePoolShared, x: Tensor, images: Tensor, weights: list[Tensor] | None = None) -> Tensor:
    """Of the changes alone: of the adapters, or of dense changes in their place."""
    one, two, three = shared.adapters()
    if weights is None:
        parts = (one.branch(x), two.branch(images), F.conv2d(images, three.delta()["weight"], padding=1))
    else:
        parts = (
            x @ weights[0].T,
            F.conv2d(images, weights[1], padding=1, groups=2),
            F.conv2d(images, weights[2], padding=1),
        )
    return sum(((p - 1 - i) ** 2).sum() for i, p in enumerate(parts))


def _inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((5, 3), (2, 2, 4, 4))
    one, two = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return one, two


def _dense_gradients(shared: SparsePoolShared, x: Tensor, images: Tensor) -> Tensor:
    """By autograd through dense changes, of all members in a row."""
    weights = [a.delta()["weight"].detach().requires_grad_() for a in shared.adapters()]
    return torch.cat([g.flatten() for g in torch.autograd.grad(_loss(shared, x, images, weights), weights)])


@pytest.mark.parametrize("position", [[0, 4, 7, 30, 43, 60], [0, 1, 2, 3, 4, 5], [50, 51, 52, 53, 54, 55]])
def test_an_exchange_equals_one_worked_on_dense_gradients(position: list[int]) -> None:
    shared = _built(SparsePool(every=1, until=0.8, fraction=0.5), position)
    x, images = _inputs()
    start = torch.tensor([0.5, -0.1, 0.3, -0.7, 0.1, 0.9], dtype=torch.float64)
    with torch.no_grad():
        shared.values.copy_(start)
    dense = _dense_gradients(shared, x, images)
    assert not shared.advance(0, 10)
    assert shared.watching
    _loss(shared, x, images).backward()
    torch.testing.assert_close(shared.values.grad, dense[position])
    # Step 1 of 8: ceil(0.5 / 2 * (1 + cos(pi / 8)) * 6) = ceil(2.886) values leave: -0.1, 0.1 and 0.3.
    assert shared.advance(1, 10)
    outside = dense.abs()
    outside[position] = 0
    kept = [position[i] for i in (0, 3, 5)]
    grown = outside.argsort(descending=True)[:3].tolist()
    assert shared.position.tolist() == sorted(kept + grown)
    held = dict(zip(shared.position.tolist(), shared.values.tolist(), strict=True))
    assert held == {**dict.fromkeys(grown, 0.0), **dict(zip(kept, [0.5, -0.7, 0.9], strict=True))}
    assert shared.spent == shared.end == 6
    # The change and its gradient follow the new positions.
    shared.watching = False
    dense = _dense_gradients(shared, x, images)
    shared.values.grad = None
    _loss(shared, x, images).backward()
    torch.testing.assert_close(shared.values.grad, dense[shared.position.long()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gradient_of_a_weight_that_is_not_there(dtype: torch.dtype) -> None:
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2, bias=False).to(dtype)
    linear = nn.Linear(5, 3, bias=False).to(dtype)
    geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
    for host, x, known in ((conv, torch.randn(2, 4, 7, 7), geometry), (linear, torch.randn(2, 4, 5), None)):
        x = x.to(dtype).requires_grad_()
        host(x).pow(3).sum().backward()
        expected, seen, anchor = x.grad.clone(), [], torch.zeros((), dtype=dtype, requires_grad=True)
        x.grad = None
        y = F.conv2d(x, host.weight.detach(), None, *known) if known else F.linear(x, host.weight.detach())
        DenseGradient.apply(y, x, anchor, seen.append, host.weight.shape, known).pow(3).sum().backward()
        torch.testing.assert_close(seen, [host.weight.grad])
        torch.testing.assert_close(x.grad, expected)
        assert anchor.grad == 0


def test_nothing_dense_outside_of_the_steps_before_an_exchange() -> None:
    shared = _built(SparsePool(every=4, until=0.5), [0, 7, 60])
    seen = []
    shared.note = lambda number, dense: seen.append((step, number))  # type: ignore[method-assign]
    x, images = _inputs()
    for step in range(20):
        shared.advance(step, 20)
        _loss(shared, x, images).backward()
        with torch.no_grad():
            _loss(shared, x, images)
    assert sorted(seen) == [(3, 0), (3, 1), (3, 2), (7, 0), (7, 1), (7, 2)]


def test_a_second_backward_pass_replaces_the_first() -> None:
    shared = _built(SparsePool(every=1, fraction=1.0), [0, 7, 60])
    shared.advance(0, 100)
    first, second = torch.zeros(2, 3), torch.zeros(2, 3)
    first[1, 1], second[0, 1], second[1, 2] = 9.0, 3.0, 4.0
    shared.note(0, first)
    shared.note(0, second)
    assert shared.advance(1, 100)
    # Two entries have a gradient, so two values leave, the first among equals.
    assert shared.position.tolist() == [1, 5, 60]


def test_entries_without_a_gradient_are_not_taken_in() -> None:
    shared = _built(SparsePool(every=1), [0, 7, 60])
    shared.advance(0, 100)
    shared.note(1, torch.full((4, 1, 3, 3), torch.nan))
    assert not shared.advance(1, 100)
    assert shared.position.tolist() == [0, 7, 60]


def test_selection_and_gains_equal_a_stable_sort_of_the_whole() -> None:
    ground = ground_of("vit", torch.float32)
    site = ground.catalog["*"]
    method, evidence = SparsePool(), ground.about(site)
    members = method.members(site)
    score = torch.cat([ground.evidence[m.name]["weight"].score.flatten() for m in members])
    signal = torch.cat([ground.evidence[m.name]["weight"].signal.flatten() for m in members])
    order = np.lexsort((np.arange(len(score)), -score.numpy()))
    for n, gain in zip((3, 64, 1000), method.gains(site, evidence, (3, 64, 1000)), strict=True):
        assert method.select(site, evidence, n).values.tolist() == sorted(order[:n].tolist())
        assert gain == pytest.approx(float(signal[order[:n].copy()].square().sum()), rel=1e-5)
    blind = SparsePool(start="random")
    assert blind.select(site, evidence, 3) is None
    assert blind.gains(site, evidence, (100,))[0] == pytest.approx(
        float(signal.square().sum()) * 100 / len(score), rel=1e-5
    )


def test_equal_scores_go_to_the_first() -> None:
    known = {
        m.name: Evidence(m, {"weight": TensorEvidence(torch.ones(m.shape), torch.ones(m.shape), torch.ones(m.shape))})
        for m in _site().members
    }
    assert SparsePool().select(_site(), Evidence(_site(), {}, known), 8).values.tolist() == list(range(8))


def test_a_plan_must_say_which_entries() -> None:
    def option(indices: list[int] | None) -> Option:
        chosen = None if indices is None else Indices(np.array(indices, dtype=np.int64))
        places = tuple(Place(name, "weight") for name in ("one", "three", "two"))
        return Option("*", "m", 2, SparsePool().cost(_site(), 2), 0.0, places, chosen)

    def build(indices: list[int] | None, method: SparsePool) -> SparsePoolShared:
        return method.build(_site(), option(indices), _Three(), torch.Generator().manual_seed(0))

    assert build([3, 77], SparsePool()).position.tolist() == [3, 77]
    assert len(build(None, SparsePool(start="random")).position) == 2
    with pytest.raises(UsageError, match="does not say which 2 entries"):
        build(None, SparsePool())
    for wrong in ([3, 78], [77, 90]):
        with pytest.raises(UsageError, match="they belong to another group"):
            build(wrong, SparsePool())


def test_counts_on_a_vit_b16() -> None:
    with torch.device("meta"):
        catalog = scan(timm.create_model("vit_base_patch16_224", num_classes=10))
    method, site = SparsePool(), catalog["*"]
    assert method.entries(site) == 84_934_656 + 589_824
    cost = method.cost(site, 85_798)
    assert (cost.trainable, cost.stored, cost.bits, cost.entries, cost.tensors) == (
        85_798,
        171_596,
        64 * 85_798,
        85_798,
        2,
    )
    assert method.sizes(site)[-1] == 1 << 25
