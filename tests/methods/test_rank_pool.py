from __future__ import annotations

import math

import pytest
import timm
import torch
from torch import nn

from autopeft.core.contracts import Method
from autopeft.core.scores import Evidence, TensorEvidence
from autopeft.core.site import Site
from autopeft.methods.rank_pool import RankPool, RankPoolShared
from autopeft.models.scan import scan
from autopeft.testing.method_laws import MethodLaws


class TestLaws(MethodLaws):
    def make(self) -> Method:
        return RankPool()


class TestLawsWithoutPenalty(MethodLaws):
    models = ("vit",)
    dtypes = (torch.float64,)

    def make(self) -> Method:
        return RankPool(start=1.0, alpha=4.0, strength=0.0)


class _Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(6, 5)
        self.two = nn.Linear(5, 8)


def _site() -> Site:
    members = tuple(
        Site(name, name, "linear", shape, True, 0, "fc", ("weight", "bias"))
        for name, shape in (("one", (5, 6)), ("two", (8, 5)))
    )
    return Site("*", "", "group", (2,), False, 0, "group", (), members=members)


def _built(method: RankPool, size: int = 1) -> RankPoolShared:
    generator = torch.Generator().manual_seed(0)
    shared = RankPoolShared(_site(), method.members(_site()), _Two().double(), size, method, generator)
    with torch.no_grad():
        for adapter in shared.adapters():
            adapter.L.add_(torch.arange(1.0, 1 + len(adapter.L)))
    return shared


def _give_scores(shared: RankPoolShared, scores: list[list[float]]) -> None:
    """Scores of the triples, all from their numbers L."""
    for name, row in zip(shared.members, scores, strict=True):
        shared.watch[name][0].mean.copy_(torch.tensor(row))
        shared.watch[name][0].spread.fill_(1.0)


def test_hand_worked_competition() -> None:
    method = RankPool(start=2.0, warmup=0.0, cooldown=0.5, every=1)
    shared = _built(method)
    assert (shared.start, shared.end, shared.unit) == (4, 2, "ranks")
    _give_scores(shared, [[3.0, 4.0], [2.0, 1.0]])
    # last = 4: 2 + 2 (1 - t / 4)^3 is 4, 2.84, 2.25, 2.03, 2, rounded down.
    found = []
    for step in range(6):
        assert not shared.advance(step, 8)
        found.append((shared.spent, tuple(shared.shares().values())))
    assert found == [(4, (2, 2))] + [(2, (2, 0))] * 5
    assert [a.L.tolist() for a in shared.adapters()] == [[1.0, 2.0], [0.0, 0.0]]


def test_score_of_a_triple() -> None:
    shared = _built(RankPool(start=2.0))
    numbers, up, down = shared.watch["one"]
    numbers.mean[1], numbers.spread[1] = 2.0, 3.0
    up.mean[2, 1], up.spread[2, 1] = 5.0, 4.0  # one of 5 entries
    down.mean[1, 0], down.spread[1, 0] = 6.0, 7.0  # one of 6
    torch.testing.assert_close(shared.scores(), torch.tensor([[0.0, 6.0 + 4.0 + 7.0], [0.0, 0.0]]).double())


def test_without_scores_ranks_are_spread_over_the_members() -> None:
    shared = _built(RankPool(start=2.0))
    shared.advance(0, 1)
    assert shared.shares() == {"one": 1, "two": 1}


def test_a_triple_that_has_lost_keeps_its_gradient_until_the_end() -> None:
    shared = _built(RankPool(start=2.0, warmup=0.0, cooldown=0.5, every=1))
    _give_scores(shared, [[3.0, 4.0], [2.0, 1.0]])
    two = shared.adapters()[1]
    x = torch.randn(4, 5, dtype=torch.float64)
    for step, alive in ((1, True), (4, False)):
        shared.advance(step, 8)
        two.L.grad = None
        with torch.no_grad():
            # What the optimizer does to it takes no part before the next competition.
            two.L.fill_(3.0)
        assert not two.delta()["weight"].any()
        y = two.branch(x)
        assert not y.any()
        y.sum().backward()
        assert bool(two.L.grad.any()) is alive
    up, down = two.low_rank()[1], two.low_rank()[0]
    assert up.shape == (8, 0)
    assert down.shape == (0, 5)
    assert not shared.stored()["members.two.L"].any()


def test_change_and_export_of_the_winners() -> None:
    shared = _built(RankPool(start=2.0, alpha=3.0))
    _give_scores(shared, [[3.0, 4.0], [5.0, 1.0]])
    shared.advance(0, 1)
    assert shared.mask.tolist() == [[False, True], [True, False]]
    for adapter, rank in zip(shared.adapters(), (1, 0), strict=True):
        expected = 3.0 * adapter.L[rank] * torch.outer(adapter.P[:, rank], adapter.Q[rank])
        torch.testing.assert_close(adapter.delta()["weight"], expected)
        down, up = adapter.low_rank()
        assert down.shape[0] == 1
        torch.testing.assert_close(up @ down, expected)


def test_penalty_is_zero_for_orthonormal_factors() -> None:
    shared = _built(RankPool(start=2.0, strength=0.5))
    with torch.no_grad():
        for adapter in shared.adapters():
            adapter.P.copy_(torch.eye(len(adapter.P), 2))
            adapter.Q.copy_(torch.eye(2, adapter.Q.shape[1]))
    assert shared.penalty().item() == 0.0
    with torch.no_grad():
        shared.adapters()[0].P[0, 0] = 2.0  # Gram matrix 4 where 1 is wanted
        shared.adapters()[1].Q[0, 1] = 1.0  # [[2, 1], [1, 1]]
    assert shared.penalty().item() == pytest.approx(0.5 * (9 + 3))


def test_gains_pool_the_singular_values() -> None:
    first, second = torch.zeros(5, 6), torch.zeros(8, 5)
    first.diagonal().copy_(torch.tensor([5.0, 4.0, 3.0, 0.0, 0.0]))
    second.diagonal().copy_(torch.tensor([2.0, 1.0, 1.0, 0.0, 0.0]))
    known = {
        member.name: Evidence(member, {"weight": TensorEvidence(signal, signal, signal)})
        for member, signal in zip(_site().members, (first, second), strict=True)
    }
    evidence = Evidence(_site(), {}, known)
    assert RankPool(start=1.0).gains(_site(), evidence, [1, 2]) == pytest.approx((25 + 4, 25 + 16 + 4 + 1))
    assert RankPool(start=2.0).gains(_site(), evidence, [1, 2]) == pytest.approx((25 + 16, 25 + 16 + 9 + 4))


def test_roles_of_the_factors() -> None:
    shared = _built(RankPool())
    assert set(shared.rate_roles) == {name for name, _ in shared.named_parameters()}
    assert shared.rate_roles["members.one.Q"] == "down"


def test_sizes_and_counts_on_a_vit_b16() -> None:
    with torch.device("meta"):
        catalog = scan(timm.create_model("vit_base_patch16_224", num_classes=10))
    for size, ranks in ((1, 2), (8, 12)):
        cost = RankPool().cost(catalog["*"], size)
        # 147,456 per rank for the 48 Linears, 1,536 for the projection of the patches, and one number per triple.
        assert cost.trainable == cost.stored == ranks * (147_456 + 1_536 + 49)
        assert cost.tensors == 147
    assert math.ceil(1.5 * RankPool().sizes(catalog["*"])[-1]) <= 589_823 // 1537
