from __future__ import annotations

import pytest

from autopeft.allocation.random import RandomMix
from autopeft.core.budget import Budget
from autopeft.core.contracts import Allocator
from autopeft.core.menu import Menu
from autopeft.errors import InfeasibleBudget
from autopeft.testing.allocator_laws import AllocatorLaws
from autopeft.testing.oracles import random_menu


class TestLaws(AllocatorLaws):
    def make(self) -> Allocator:
        return RandomMix()


def test_nothing_can_be_added_and_nothing_can_grow(small_menus: list[tuple[Menu, Budget]]) -> None:
    for menu, budget in [*small_menus, *((random_menu(s, sites=6), Budget(25)) for s in range(20))]:
        for seed in range(3):
            plan = RandomMix().allocate(menu, budget, seed)
            left = budget.limit - plan.spent
            taken = {p for o in plan for p in o.places}
            bought = {(o.site, o.method, o.places): o.cost.trainable for o in plan}
            for o in menu:
                if not taken & set(o.places):
                    assert o.cost.trainable > left
                paid = bought.get((o.site, o.method, o.places))
                if paid is not None and o.cost.trainable > paid:
                    assert o.cost.trainable - paid > left


def test_seeds_give_different_plans_of_several_methods(small_menus: list[tuple[Menu, Budget]]) -> None:
    menu, budget = small_menus[2]
    plans = [RandomMix().allocate(menu, budget, seed) for seed in range(10)]
    assert len({plan.digest for plan in plans}) >= 8
    assert len({o.method for plan in plans for o in plan}) >= 5
    assert all(plan.spent >= 0.9 * budget.limit for plan in plans)


def test_nothing_fits() -> None:
    with pytest.raises(InfeasibleBudget, match="buys nothing") as caught:
        RandomMix().allocate(random_menu(1), Budget(0))
    assert caught.value.cheapest == min(o.cost.trainable for o in random_menu(1))
    assert len(RandomMix().allocate(Menu(()), Budget(0))) == 0
