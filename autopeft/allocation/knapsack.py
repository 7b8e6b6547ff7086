"""The plan of largest predicted gain: an exact multiple-choice knapsack."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from autopeft.allocation import _exact, _rules
from autopeft.allocation._milp import MilpPacking
from autopeft.allocation._problem import Problem
from autopeft.allocation._selectors import Selectors
from autopeft.core.allocation import Allocation, Provenance
from autopeft.core.budget import Budget
from autopeft.core.menu import Menu, Option
from autopeft.errors import InfeasibleBudget, UsageError

__all__ = ["Knapsack"]

_ROUNDING = 1e-12
"""Relative difference between a bound and a gain that is the order of summation, not a gap."""


@dataclass(frozen=True, slots=True)
class Knapsack:
    """Chooses the options of largest total gain within the budget, with a proof.

    Without side constraints: dominance, linear bound, reduced-cost fixing and dynamic programming on the core
    (`_mckp`), one such problem per decision about the options that interlock many others (`_hubs`). With side
    constraints that this plan does not keep anyway, or when there are too many such decisions: scipy's HiGHS, on the
    columns that reduced costs leave open; a limit on methods alone: every set of them, where these are few. Plans of
    equal gain break by the options' canonical order, never by the order they were given in. The result is the same on
    every call unless `time_limit` strikes. The menu's caps are kept too.

    Sites are spoken of by name, by a glob over names, or as `role:ROLE` (a role, a glob over roles, or one of the
    groups qkv, proj, mlp, norm, conv, other); `require` and `forbid` also take `method:KEY`.

    Attributes:
        gap: relative gap to the proven bound at which to stop; 0 stops at the optimum.
        time_limit: seconds after which the best plan found is returned, with the bound proven by then.
        require: sites at which at least one option must be bought (of a glob: at each of them where there is one), and
            methods of which at least one must.
        forbid: sites at which nothing may be bought, and methods of which nothing may.
        max_options: largest number of options, None for any.
        max_methods: largest number of different methods, None for any.
        max_size: largest size per method key, such as `{"lora": 16}` for a server that caps ranks.
        tie: sites that take one size together: all of them take a method, at the same size, or none does. `role` ties
            the sites of every role.
        every_block: whether each block must get at least one option.
        curve: exponent g in [0.4, 1] of the blocks' curves: the sum over blocks of (sum of the block's gains)^g is
            maximised, in 16 straight pieces. 1 is the plain sum of the gains. The gain of an option that reaches into
            several blocks counts in equal shares.

    Raises:
        UsageError: for a value outside of its range, or a site that is required and forbidden.
    """

    gap: float = 0.0
    time_limit: float = 60.0
    require: tuple[str, ...] = ()
    forbid: tuple[str, ...] = ()
    max_options: int | None = None
    max_methods: int | None = None
    max_size: Mapping[str, int] = field(default_factory=dict, hash=False)
    tie: tuple[str, ...] = ()
    every_block: bool = False
    curve: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.gap < 1:
            raise UsageError(f"gap of the knapsack must be at least 0 and below 1, got {self.gap}")
        if not self.time_limit > 0:
            raise UsageError(f"time_limit of the knapsack must be above 0 seconds, got {self.time_limit}")
        for name in ("max_options", "max_methods"):
            most = getattr(self, name)
            if most is not None and most < 1:
                raise UsageError(f"{name} of the knapsack must be at least 1, got {most}")
        for method, size in self.max_size.items():
            if size < 1:
                raise UsageError(f"max_size of method {method!r} must be at least 1, got {size}; use forbid instead")
        if not 0.4 <= self.curve <= 1:
            raise UsageError(f"curve of the knapsack must lie between 0.4 and 1, got {self.curve}")
        both = sorted(set(self.require) & set(self.forbid))
        if both:
            raise UsageError(f"the knapsack is asked to require and to forbid {', '.join(both)}; keep one of them")

    def allocate(self, menu: Menu, budget: Budget, seed: int = 0) -> Allocation:
        """The best plan; empty when nothing on the menu has a positive gain.

        Args:
            menu: the options.
            budget: the limit.
            seed: not used; the plan is exact.

        Raises:
            InfeasibleBudget: when the menu is not empty and its cheapest option costs more than the budget, or when no
                plan within the budget keeps the side constraints; carries the cost of the cheapest plan that does.
            UsageError: when a setting names a site that the menu does not have.
        """
        started = time.perf_counter()
        problem = self._problem(menu, budget)
        if len(problem.bundles) and problem.costs.min() > budget.limit:
            raise _nothing_fits(problem, budget)
        found = _exact.solve(problem, budget.limit, self.gap, self.time_limit)
        if found is None:
            raise self._refusal(problem, budget)
        return self._plan(problem, found, menu, budget, started)

    def next_best(self, menu: Menu, budget: Budget, plan: Allocation) -> Allocation | None:
        """The best plan within the same constraints that is not `plan`; None when there is no other.

        Only options that gain something, or that a constraint may call for, count as another plan. `time_limit` is
        kept: a bound above the gain says that the search for it was cut short.

        Args:
            menu: the options.
            budget: the limit.
            plan: what `allocate` gave for them.

        Raises:
            UsageError: when the plan is not one of this menu.
        """
        started = time.perf_counter()
        problem = self._problem(menu, budget)
        chosen = _bought(problem, plan)
        if chosen is None:
            raise UsageError("the plan whose rival is asked for was not bought from this menu under these constraints")
        found = _exact.second(problem, chosen, plan.gap == 0, budget.limit, self.time_limit)
        return None if found is None else self._plan(problem, found, menu, budget, started)

    @property
    def plain(self) -> bool:
        """Whether it is held to nothing but the budget."""
        return self == Knapsack(gap=self.gap, time_limit=self.time_limit, curve=self.curve)

    def offered(self, menu: Menu) -> tuple[Option, ...]:
        """The options that `forbid` and `max_size` leave.

        Raises:
            UsageError: when `forbid` names what is not on the menu.
        """
        return _rules.offered(menu, self, Selectors(menu))

    def keeps(self, menu: Menu, plan: Allocation) -> bool:
        """Whether a plan of whatever origin keeps the side constraints and the menu's caps.

        False also for a plan with options that are not on the menu: nothing is known of those.

        Args:
            menu: the options.
            plan: within its own budget.
        """
        problem = self._problem(menu, plan.budget)
        chosen = _bought(problem, plan)
        return chosen is not None and problem.keeps(chosen)

    def cheapest(self, menu: Menu, budget: Budget) -> Allocation | None:
        """The plan of least cost that keeps the side constraints and buys something, whatever the budget.

        Args:
            menu: the options.
            budget: says what is counted; its limit is not looked at.
        """
        started = time.perf_counter()
        problem = self._problem(menu, budget)
        found = problem.cheapest(self.time_limit)
        if found is None:
            return None
        cost = int(problem.costs[list(found.chosen)].sum())
        return self._plan(
            problem, found, menu, dataclasses.replace(budget, limit=cost, share_of=None, text=""), started
        )

    def refusal(self, menu: Menu, budget: Budget) -> InfeasibleBudget:
        """The error that says what the cheapest plan within the side constraints costs, or that there is none.

        Args:
            menu: the options, also those that cost more than the budget; gains are not looked at.
            budget: the limit.
        """
        return self._refusal(self._problem(menu, budget), budget)

    def _problem(self, menu: Menu, budget: Budget) -> Problem:
        known = Selectors(menu)
        bundles = _rules.bundles_of(_rules.offered(menu, self, known), self, known)
        costs = np.array([b.option.cost.of(budget.unit) for b in bundles], dtype=np.int64)
        gains = np.array([b.option.gain for b in bundles], dtype=np.float64)
        rows = _rules.rows_of(bundles, self, known)
        blocks = () if self.curve == 1.0 else _rules.shares_of(bundles, known)
        return Problem(bundles, costs, gains, rows, self.max_methods, menu.caps, blocks, self.curve)

    def _plan(self, problem: Problem, found: MilpPacking, menu: Menu, budget: Budget, started: float) -> Allocation:
        options = tuple(o for i in found.chosen for o in problem.bundles[i].members)
        plan = Allocation(options, budget)
        scorer = menu.scores.origin.scorer if menu.scores is not None else ""
        worth = plan.gain if problem.linear else found.value
        bound = worth if found.bound - worth <= _ROUNDING * abs(worth) else found.bound
        value = None if problem.linear else found.value
        seconds = time.perf_counter() - started
        return Allocation(plan.options, budget, Provenance(self._name(), scorer, bound, found.price, seconds, value))

    def _name(self) -> str:
        plain = Knapsack()
        settings = [
            f"{f.name}={getattr(self, f.name)!r}"
            for f in dataclasses.fields(self)
            if f.name != "time_limit" and getattr(self, f.name) != getattr(plain, f.name)
        ]
        return f"knapsack({', '.join(settings)})" if settings else "knapsack"

    def _refusal(self, problem: Problem, budget: Budget) -> InfeasibleBudget:
        lacking = [row.what for row in problem.rows if not row.members and row.low > 0]
        asked = [row.what for row in problem.rows] + [
            *([f"at most {self.max_methods} methods"] if self.max_methods is not None else []),
            *(f"{cap.name} of at most {cap.most:,.6g}" for cap in problem.caps),
        ]
        if not asked and len(problem.bundles):
            return _nothing_fits(problem, budget)
        found = None if lacking else problem.cheapest(self.time_limit)
        if found is None:
            why = f"nothing on the menu is {lacking[0]}" if lacking else "they contradict each other at any budget"
            what = "; ".join(_short(lacking or asked))
            return InfeasibleBudget(f"a budget of {budget} buys no plan with {what}: {why}. Ask for less")
        members = [o for i in found.chosen for o in problem.bundles[i].members]
        cost = int(problem.costs[list(found.chosen)].sum())
        listed = ", ".join(_short([f"{o.method} of size {o.size} at {o.site}" for o in members]))
        return InfeasibleBudget(
            f"a budget of {budget} buys no plan with {'; '.join(_short(asked))}: the cheapest one costs {cost:,} "
            f"({listed}). Raise the budget to at least {cost:,} or ask for less",
            cost,
        )


def _bought(problem: Problem, plan: Allocation) -> list[int] | None:
    """Positions of the bundles that a plan is made of; None when it has options that are in none of them."""
    bought = {o.ident for o in plan}
    chosen = [i for i, b in enumerate(problem.bundles) if {o.ident for o in b.members} <= bought]
    return chosen if sum(len(problem.bundles[i].members) for i in chosen) == len(plan) else None


def _short(texts: list[str], most: int = 4) -> list[str]:
    """The first few, and how many more there are."""
    return texts if len(texts) <= most + 1 else [*texts[:most], f"{len(texts) - most} more"]


def _nothing_fits(problem: Problem, budget: Budget) -> InfeasibleBudget:
    i = int(problem.costs.argmin())
    cheapest, cost = problem.bundles[i].option, int(problem.costs[i])
    return InfeasibleBudget(
        f"a budget of {budget} buys nothing: the cheapest option, {cheapest.method} of size {cheapest.size} at "
        f"{cheapest.site}, costs {cost:,}. Raise the budget to at least {cost:,}.",
        cost,
    )
