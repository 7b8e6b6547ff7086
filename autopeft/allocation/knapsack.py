"""The plan of largest predicted gain: an exact multiple-choice knapsack."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from autopeft.allocation import _groups, _hubs, _mckp, _milp
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
    constraints, or when there are too many such decisions: scipy's HiGHS. Plans of equal
    gain break by the options' canonical order, never by the order they were given in. The result is the same on every
    call unless `time_limit` strikes.

    Attributes:
        gap: relative gap to the proven bound at which to stop; 0 stops at the optimum.
        time_limit: seconds after which the best plan found is returned, with the bound proven by then.
        require: sites at which at least one option must be bought.
        forbid: sites at which nothing may be bought.
        max_options: largest number of options, None for any.
        max_size: largest size per method key, such as `{"lora": 16}` for a server that caps ranks.

    Raises:
        UsageError: for a value outside of its range, or a site that is required and forbidden.
    """

    gap: float = 0.0
    time_limit: float = 60.0
    require: tuple[str, ...] = ()
    forbid: tuple[str, ...] = ()
    max_options: int | None = None
    max_size: Mapping[str, int] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if not 0 <= self.gap < 1:
            raise UsageError(f"gap of the knapsack must be at least 0 and below 1, got {self.gap}")
        if not self.time_limit > 0:
            raise UsageError(f"time_limit of the knapsack must be above 0 seconds, got {self.time_limit}")
        if self.max_options is not None and self.max_options < 1:
            raise UsageError(f"max_options of the knapsack must be at least 1, got {self.max_options}")
        for method, size in self.max_size.items():
            if size < 1:
                raise UsageError(f"max_size of method {method!r} must be at least 1, got {size}; use forbid instead")
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
            InfeasibleBudget: when the menu is not empty and its cheapest option costs more than the budget, or when the
                required sites cannot all be bought.
            UsageError: when a required or forbidden site is unknown.
        """
        started = time.perf_counter()
        options = self._offered(menu)
        costs = np.array([o.cost.of(budget.unit) for o in options], dtype=np.int64)
        gains = np.array([o.gain for o in options], dtype=np.float64)
        if len(options) and costs.min() > budget.limit:
            raise _nothing_fits(options, costs.tolist(), budget)
        groups = hubs = None
        if not self.require and self.max_options is None:
            groups = _groups.group_options(options, costs, gains, budget.limit)
            if groups is None:
                hubs = _hubs.solve(options, costs, gains, budget.limit, self.gap, self.time_limit)
        if groups is not None:
            packing = _mckp.solve(groups, budget.limit, self.gap, self.time_limit)
            picks = [i for group, item in zip(groups, packing.items, strict=True) for i in group.picks[item].tolist()]
            chosen = [i for i in picks if i >= 0]
            bound, price = packing.bound, packing.price
        elif hubs is not None:
            chosen, bound, price = list(hubs.chosen), hubs.bound, hubs.price
        else:
            chosen, bound, price = self._by_milp(options, costs, gains, budget)
        plan = Allocation(tuple(options[i] for i in chosen), budget)
        scorer = menu.scores.origin.scorer if menu.scores is not None else ""
        seconds = time.perf_counter() - started
        if bound - plan.gain <= _ROUNDING * abs(plan.gain):
            bound = plan.gain
        return Allocation(plan.options, budget, Provenance(self._name(), scorer, bound, price, seconds))

    def _name(self) -> str:
        settings = [
            f"{name}={getattr(self, name)!r}"
            for name, default in (
                ("gap", 0.0),
                ("require", ()),
                ("forbid", ()),
                ("max_options", None),
                ("max_size", {}),
            )
            if getattr(self, name) != default
        ]
        return f"knapsack({', '.join(settings)})" if settings else "knapsack"

    def _offered(self, menu: Menu) -> tuple[Option, ...]:
        known = {o.site for o in menu.options} | {p.site for o in menu.options for p in o.places} | set(menu.sites)
        for name in (*self.require, *self.forbid):
            if name not in known:
                raise UsageError(f"the knapsack requires or forbids {name!r}, which is not a site of this menu")
        forbidden = set(self.forbid)
        return tuple(
            o
            for o in menu.options
            if o.size <= self.max_size.get(o.method, o.size) and not (forbidden and forbidden & _touched(o))
        )

    def _by_milp(
        self, options: tuple[Option, ...], costs: np.ndarray, gains: np.ndarray, budget: Budget
    ) -> tuple[list[int], float, float]:
        wanted = set(self.require)
        useful = [
            i
            for i, o in enumerate(options)
            if costs[i] <= budget.limit and (gains[i] > 0 or (wanted and wanted & _touched(o)))
        ]
        kept = [options[i] for i in useful]
        covers = [[k for k, o in enumerate(kept) if name in _touched(o)] for name in self.require]
        lacking = [name for name, cover in zip(self.require, covers, strict=True) if not cover]
        found = None
        if not lacking:
            found = _milp.pack(
                kept,
                costs[useful],
                gains[useful],
                budget.limit,
                covers=covers,
                max_options=self.max_options,
                gap=self.gap,
                seconds=self.time_limit,
            )
        if found is None:
            least = [
                min((c for o, c in zip(options, costs.tolist(), strict=True) if name in _touched(o)), default=None)
                for name in self.require
            ]
            cheapest = None if None in least else sum(c for c in least if c is not None)
            raise InfeasibleBudget(
                f"a budget of {budget} does not buy an option at each of the required sites "
                f"{', '.join(lacking or self.require)} within the other constraints; raise it or require fewer sites",
                cheapest,
            )
        return [useful[k] for k in found.chosen], found.bound, found.price


def _touched(option: Option) -> set[str]:
    """The sites that an option is bought at: its own, and the slices that a whole projection occupies."""
    return {option.site, *(place.site for place in option.places)}


def _nothing_fits(options: tuple[Option, ...], costs: list[int], budget: Budget) -> InfeasibleBudget:
    i = min(range(len(options)), key=costs.__getitem__)
    cheapest = options[i]
    return InfeasibleBudget(
        f"a budget of {budget} buys nothing: the cheapest option, {cheapest.method} of size {cheapest.size} at "
        f"{cheapest.site}, costs {costs[i]:,}. Raise the budget to at least {costs[i]:,}.",
        costs[i],
    )
