"""The best plan and the next best one, by whatever proves them soonest."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np

from autopeft.allocation import _groups, _hubs, _mckp
from autopeft.allocation._groups import Group
from autopeft.allocation._milp import MilpPacking
from autopeft.allocation._problem import Problem

__all__ = ["second", "solve"]

_TOLERANCE = 1e-12
"""Relative difference of gains that counts as equal."""

_SETS = 70
"""Sets of methods that are packed one by one; with more of them, HiGHS decides which methods to use."""


def solve(problem: Problem, limit: int, gap: float, seconds: float) -> MilpPacking | None:
    """The plan of largest gain; None when none keeps the side constraints.

    The plan that is best without side constraints is best with them as well, when it keeps them.

    Args:
        problem: what can be bought.
        limit: the budget.
        gap: relative gap to the bound at which to stop.
        seconds: time after which to stop with the best found.
    """
    deadline = time.perf_counter() + seconds
    if problem.linear:
        found = _dynamic(problem, problem.gains, limit, gap, seconds)
        if found is not None and (problem.plain or problem.keeps(found.chosen)):
            return found
        if found is not None and problem.counts_methods_alone:
            found = _by_methods(problem, limit, gap, deadline)
            if found is not None:
                return found
    return problem.solve(limit, gap, max(deadline - time.perf_counter(), 1e-3))


def second(problem: Problem, chosen: Sequence[int], proven: bool, limit: int, seconds: float) -> MilpPacking | None:
    """The best plan other than `chosen`; None when there is none.

    A plan without side constraints that contains the best one would gain more than it, so another plan leaves out one
    of its options at least: the next best plan is the best of those that leave out the first, the second, and so on.
    With side constraints, one inequality that `chosen` alone violates.

    Args:
        problem: what can be bought.
        chosen: positions of the plan.
        proven: whether it is known to be the best one.
        limit: the budget.
        seconds: time after which to stop with the best found.
    """
    deadline = time.perf_counter() + seconds
    if problem.plain and proven:
        try:
            return _Leaving(problem, limit, deadline).best(chosen)
        except OverflowError:
            found = _without_each(problem, chosen, limit, deadline)
        if found is not None:
            return found if found.chosen or chosen else None
    return problem.solve(limit, 0.0, max(deadline - time.perf_counter(), 1e-3), barred=chosen)


def _dynamic(problem: Problem, gains: Any, limit: int, gap: float, seconds: float) -> MilpPacking | None:
    """Without HiGHS and without side constraints; None when too much interlocks."""
    options = [b.option for b in problem.bundles]
    groups = _groups.group_options(options, problem.costs, gains, limit)
    if groups is not None:
        packing = _mckp.solve(groups, limit, gap, seconds)
        picked = _picked(groups, packing)
        return MilpPacking(picked, math.fsum(gains[list(picked)].tolist()), packing.bound, packing.price)
    hubs = _hubs.solve(options, problem.costs, gains, limit, gap, seconds)
    if hubs is None:
        return None
    return MilpPacking(hubs.chosen, math.fsum(gains[list(hubs.chosen)].tolist()), hubs.bound, hubs.price)


def _by_methods(problem: Problem, limit: int, gap: float, deadline: float) -> MilpPacking | None:
    """The best plan of at most so many methods: the best one of any such set; None when there are too many sets."""
    method = np.array([b.option.method for b in problem.bundles])
    known = sorted(set(method[problem.gains > 0].tolist()))
    most = min(problem.max_methods or 0, len(known))
    if math.comb(len(known), most) > _SETS:
        return None
    best: MilpPacking | None = None
    bound = 0.0
    for keys in combinations(known, most):
        gains = np.where(np.isin(method, keys), problem.gains, 0.0)
        found = _dynamic(problem, gains, limit, gap, max(deadline - time.perf_counter(), 1e-3))
        if found is None:
            return None
        bound = max(bound, found.bound)
        better = best is None or found.value > best.value + _TOLERANCE * abs(best.value)
        level = best is not None and abs(found.value - best.value) <= _TOLERANCE * abs(best.value)
        if better or (level and best is not None and found.chosen < best.chosen):
            best = found
    return None if best is None else MilpPacking(best.chosen, best.value, max(bound, best.value), best.price)


def _picked(groups: Sequence[Group], packing: _mckp.Packing) -> tuple[int, ...]:
    picks = [i for group, item in zip(groups, packing.items, strict=True) for i in group.picks[item].tolist()]
    return tuple(sorted(i for i in picks if i >= 0))


class _Leaving:
    """Plans that leave one option out, where components are small enough to be groups.

    At the dual price every component has a value, and their sum with the price of the budget bounds every plan from
    above; a component without one of its options has a smaller one. Plans are solved by decreasing bound until none
    that is left can be better.

    Raises:
        OverflowError: when a component has too many compatible sets to look at.
    """

    def __init__(self, problem: Problem, limit: int, deadline: float) -> None:
        self._problem, self._limit, self._deadline = problem, limit, deadline
        self._cells = _groups.cells_of([b.option for b in problem.bundles], problem.costs, problem.gains, limit)
        self._parts = _groups.components(list(self._cells))
        self._groups = [self._group(part) for part in range(len(self._parts))]

    def _group(self, part: int, left_out: int = -1) -> Group:
        cells = {p: [i for i in self._cells[p] if i != left_out] for p in self._parts[part]}
        cells = {places: members for places, members in cells.items() if members}
        if not cells:
            return Group(np.zeros(1, np.int64), np.zeros(1), np.full((1, 1), -1, dtype=np.int64))
        group = _groups.group_of(cells, self._problem.costs, self._problem.gains, self._limit)
        if group is None:
            raise OverflowError("too many compatible sets in one component")
        return group

    def best(self, chosen: Sequence[int]) -> MilpPacking | None:
        """The best plan that leaves out one of the chosen options."""
        price = _mckp.relax(self._groups, self._limit).price
        values = [_value(group, price) for group in self._groups]
        whole = price * self._limit + math.fsum(values)
        home = {i: part for part, keys in enumerate(self._parts) for key in keys for i in self._cells[key]}
        tries = []
        for i in chosen:
            group = self._group(home[i], i)
            tries.append((whole - values[home[i]] + _value(group, price), i, group))
        tries.sort(key=lambda t: (-t[0], t[1]))
        found: MilpPacking | None = None
        left = -math.inf
        for bound, i, group in tries:
            if found is not None and bound <= found.value + _TOLERANCE * abs(found.value):
                break
            seconds = self._deadline - time.perf_counter()
            if seconds <= 0 and found is not None:
                left = max(left, bound)
                continue
            groups = [group if part == home[i] else g for part, g in enumerate(self._groups)]
            packing = _mckp.solve(groups, self._limit, 0.0, max(seconds, 0.0))
            picked = _picked(groups, packing)
            gain = math.fsum(self._problem.gains[list(picked)].tolist())
            if not packing.optimal:
                left = max(left, min(bound, packing.bound))
            if found is None or gain > found.value:
                found = MilpPacking(picked, gain, gain, packing.price)
        if found is None:
            return None
        return MilpPacking(found.chosen, found.value, max(found.value, left), found.price)


def _value(group: Group, price: float) -> float:
    return float((group.gains - price * group.costs).max())


def _without_each(problem: Problem, chosen: Sequence[int], limit: int, deadline: float) -> MilpPacking | None:
    """The same where options interlock widely, one by one; None when that leads nowhere."""
    found: MilpPacking | None = None
    left = -math.inf
    for i in chosen:
        seconds = deadline - time.perf_counter()
        gains = problem.gains.copy()
        gains[i] = 0.0
        one = _dynamic(problem, gains, limit, 0.0, max(seconds, 1e-3))
        if one is None:
            return None
        left = max(left, one.bound)
        if found is None or one.value > found.value:
            found = one
    if found is None:
        return MilpPacking((), 0.0, 0.0, 0.0)
    close = left - found.value <= 1e-9 * abs(found.value)
    return MilpPacking(found.chosen, found.value, found.value if close else left, found.price)
