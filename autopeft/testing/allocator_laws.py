"""Laws of allocators.

Subclass `AllocatorLaws`, give `make()` and, where the allocator needs more than options, `menus()`; pytest does the
rest. `BROKEN` holds one allocator per law that breaks this law and no other.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from autopeft.core.allocation import Allocation
from autopeft.core.budget import Budget
from autopeft.core.contracts import Allocator
from autopeft.core.menu import Menu, Option
from autopeft.core.scores import Scores
from autopeft.core.site import Place
from autopeft.errors import InfeasibleBudget
from autopeft.testing.oracles import random_menu, stated_optimum

__all__ = ["BROKEN", "AllocatorLaws", "outcome"]

_SEED = 7


def outcome(allocator: Allocator, menu: Menu, budget: Budget, seed: int = _SEED) -> Allocation:
    """The plan, or the empty one where the allocator says that the budget buys nothing."""
    try:
        return allocator.allocate(menu, budget, seed)
    except InfeasibleBudget:
        return Allocation((), budget)


class AllocatorLaws:
    """Base class of allocators' tests.

    Attributes:
        exact: whether the allocator claims to find the largest gain.
    """

    exact: ClassVar[bool] = False

    def make(self) -> Allocator:
        """The allocator under test; called anew for every use, so that hidden state shows."""
        raise NotImplementedError

    def menus(self) -> Iterator[tuple[Menu, Budget]]:
        """Menus and budgets to try: small, with ties, options above the budget and options of several places."""
        for seed in range(16):
            for limit in (0, 1, 9, 30):
                yield random_menu(seed), Budget(limit)
        yield Menu(()), Budget(5)

    def test_within_budget(self) -> None:
        """The plan is bought from the menu, under the given budget, and costs no more; some budget buys something."""
        bought = 0
        for menu, budget in self.menus():
            plan = outcome(self.make(), menu, budget)
            spent = sum(o.cost.of(budget.unit) for o in plan.options)
            assert plan.budget == budget, f"the plan answers for {plan.budget}, it was given {budget}"
            assert spent <= budget.limit, f"spent {spent} of {budget.limit}"
            bought += len(plan)
        self.check_bought(bought)

    def check_bought(self, bought: int) -> None:
        """Fails when nothing was ever bought: that would keep every law. Override for allocators that mean it."""
        assert bought > 0, "the allocator bought nothing on any menu"

    def test_deterministic(self) -> None:
        """Two calls give the same plan, on one object and on two."""
        for menu, budget in self.menus():
            one, other = self.make(), self.make()
            first = outcome(one, menu, budget)
            assert first == outcome(one, menu, budget), "a second call of one allocator gave another plan"
            assert first == outcome(other, menu, budget), "an equal allocator gave another plan"

    def test_blind_to_order(self) -> None:
        """A menu that lists options and sites in another order gives the same plan."""
        for i, (menu, budget) in enumerate(self.menus()):
            first = outcome(self.make(), menu, budget)
            assert first == outcome(self.make(), _shuffled(menu, i), budget), "the order of the menu decides"

    def test_exact(self) -> None:
        """Exact allocators gain as much as the best of all plans, and their bound says so."""
        if not self.exact:
            return
        for menu, budget in self.menus():
            plan = outcome(self.make(), menu, budget)
            best = stated_optimum(menu, budget)
            assert abs(plan.gain - best) <= 1e-9 * max(1.0, abs(best)), f"gained {plan.gain}, the best plan {best}"
            bound = plan.provenance.bound
            assert bound is None or bound >= best - 1e-9 * max(1.0, abs(best)), f"bound {bound} below {best}"


def _shuffled(menu: Menu, seed: int) -> Menu:
    """The same menu with everything that has an order in another one."""
    draw = random.Random(seed)

    def mixed(mapping: Mapping[Any, Any]) -> dict[Any, Any]:
        keys = list(mapping)
        draw.shuffle(keys)
        return {key: mapping[key] for key in keys}

    options = list(menu.options)
    draw.shuffle(options)
    scores = menu.scores
    if scores is not None:
        scores = Scores(scores.origin, mixed(scores.totals), mixed(scores.evidence))
    return Menu(tuple(options), mixed(menu.sites), scores)


def _greedy(ranked: Iterable[Option], budget: Budget, into: Budget | None = None) -> Allocation:
    """Take what fits, in this order."""
    taken: dict[Place, Option] = {}
    left = budget.limit
    for o in ranked:
        cost = o.cost.of(budget.unit)
        if o.gain > 0 and cost <= left and not taken.keys() & set(o.places):
            taken |= dict.fromkeys(o.places, o)
            left -= cost
    return Allocation(tuple({o.key: o for o in taken.values()}.values()), into or budget)


@dataclass(frozen=True, slots=True)
class _Steepest:
    """Gain per cost, greedily: keeps every law but exactness."""

    def allocate(self, menu: Menu, budget: Budget, seed: int = 0) -> Allocation:
        return _greedy(sorted(menu.options, key=lambda o: (-o.gain / o.cost.of(budget.unit), o.order)), budget)


@dataclass(frozen=True, slots=True)
class _Overspender:
    """Buys under a budget one and a half times as large."""

    def allocate(self, menu: Menu, budget: Budget, seed: int = 0) -> Allocation:
        larger = dataclasses.replace(budget, limit=budget.limit * 3 // 2)
        return _Steepest().allocate(menu, larger, seed)


@dataclass(frozen=True, slots=True)
class _Fickle:
    """Remembers that it was asked before, and then answers otherwise."""

    calls: list[int] = field(default_factory=list)

    def allocate(self, menu: Menu, budget: Budget, seed: int = 0) -> Allocation:
        self.calls.append(1)
        sign = 1 if len(self.calls) % 2 else -1
        return _greedy(sorted(menu.options, key=lambda o: (sign * o.cost.of(budget.unit), o.order)), budget)


@dataclass(frozen=True, slots=True)
class _FirstListed:
    """Serves sites in the order in which the menu happens to list them."""

    def allocate(self, menu: Menu, budget: Budget, seed: int = 0) -> Allocation:
        rank = {name: i for i, name in enumerate(menu.sites)}
        return _greedy(sorted(menu.options, key=lambda o: (rank[o.site], o.order)), budget)


BROKEN: Mapping[str, Callable[[], Allocator]] = {
    "test_within_budget": _Overspender,
    "test_deterministic": _Fickle,
    "test_blind_to_order": _FirstListed,
    "test_exact": _Steepest,
}
"""Law to an allocator that breaks this law and keeps the others (the last one claims to be exact)."""
