from __future__ import annotations

from autopeft.allocation.head_only import HeadOnly
from autopeft.core.budget import Budget
from autopeft.core.contracts import Allocator
from autopeft.core.menu import Menu
from autopeft.testing.allocator_laws import AllocatorLaws


class TestLaws(AllocatorLaws):
    def make(self) -> Allocator:
        return HeadOnly()

    def check_bought(self, bought: int) -> None:
        assert bought == 0


def test_it_is_the_empty_plan_of_the_budget() -> None:
    plan = HeadOnly().allocate(Menu(()), Budget(7))
    assert (plan.options, plan.budget, plan.provenance.allocator) == ((), Budget(7), "head_only")
