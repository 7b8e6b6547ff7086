from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autopeft.core.allocation import Allocation, Provenance
from autopeft.core.budget import Budget, Cost
from autopeft.core.menu import Indices, Option
from autopeft.core.site import Place
from autopeft.errors import InfeasibleBudget, UsageError


def option(site: str, trainable: int, method: str = "lora", gain: float = 1.0, *places: Place) -> Option:
    return Option(site, method, 1, Cost.plain(trainable, 100), gain, places or (Place(site, "weight"),))


def test_a_plan_over_its_budget_cannot_be_built() -> None:
    options = (option("a", 60), option("b", 41))
    assert Allocation(options, Budget(101)).spent == 101
    with pytest.raises(InfeasibleBudget, match="costs 101 trainable, more than the budget of 100 trainable"):
        Allocation(options, Budget(100))


def test_the_limit_counts_in_its_own_unit() -> None:
    options = (option("a", 60),)  # 240 bytes and a header of 96; 100 entries
    assert Allocation(options, Budget(336, "bytes")).spent == 336
    with pytest.raises(InfeasibleBudget):
        Allocation(options, Budget(335, "bytes"))
    assert Allocation(options, Budget(60, "stored")).spent == 60
    with pytest.raises(InfeasibleBudget):
        Allocation(options, Budget(59, "stored"))
    assert Allocation(options, Budget(100, "entries")).spent == 100
    with pytest.raises(InfeasibleBudget):
        Allocation(options, Budget(99, "entries"))


def test_a_place_is_sold_once() -> None:
    q, k = Place("qkv[q]", "weight"), Place("qkv[k]", "weight")
    whole = option("qkv", 5, "lora", 1.0, k, q)
    with pytest.raises(UsageError, match=r"both occupy qkv\[q\]:weight"):
        Allocation((whole, option("qkv[q]", 3, "core", 1.0, q)), Budget(100))
    both = Allocation((option("a", 5), option("a", 3, "bias", 1.0, Place("a", "bias"))), Budget(100))
    assert both.trainable == 8


def test_sums() -> None:
    plan = Allocation((option("b", 7, gain=0.25), option("a", 5, gain=0.5)), Budget(20))
    assert plan.cost == Cost(12, 12, 384, 200, 2)
    assert (plan.spent, plan.trainable, plan.gain, len(plan)) == (12, 12, 0.75, 2)
    assert [o.site for o in plan] == ["a", "b"]


def test_buying_nothing_is_always_allowed() -> None:
    empty = Allocation((), Budget(0))
    assert (empty.spent, empty.cost, len(empty)) == (0, Cost.zero(), 0)


def test_provenance_is_no_part_of_equality_but_the_budget_is() -> None:
    plan = Allocation((option("a", 5),), Budget(20))
    by_hand = Allocation((option("a", 5),), Budget(20), Provenance("by hand", seconds=3.0))
    assert plan == by_hand
    assert hash(plan) == hash(by_hand)
    assert plan != Allocation((option("a", 5),), Budget(21))
    assert plan != "plan"


def test_the_digest_follows_the_adapters_not_the_predictions() -> None:
    plan = Allocation((option("a", 5, gain=1.0), option("b", 5)), Budget(20))
    assert plan.digest == Allocation((option("b", 5), option("a", 5, gain=2.0)), Budget(30)).digest
    assert len(plan.digest) == 16
    first = dataclasses.replace(plan.options[0], method="core")
    assert plan.digest != Allocation((first, plan.options[1]), Budget(20)).digest
    chosen = dataclasses.replace(plan.options[0], indices=Indices(np.array([3])))
    other = dataclasses.replace(plan.options[0], indices=Indices(np.array([4])))
    digests = {Allocation((o, plan.options[1]), Budget(20)).digest for o in (plan.options[0], chosen, other)}
    assert len(digests) == 3


@given(st.lists(st.integers(1, 50), max_size=8), st.integers(0, 200))
def test_whatever_is_built_fits(costs: list[int], limit: int) -> None:
    options = tuple(option(f"site{i}", cost) for i, cost in enumerate(costs))
    if sum(costs) <= limit:
        assert Allocation(options, Budget(limit)).spent == sum(costs)
    else:
        with pytest.raises(InfeasibleBudget):
            Allocation(options, Budget(limit))
