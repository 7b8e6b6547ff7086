"""The multiple-choice knapsack, solved to proven optimality.

The linear relaxation is greedy on the groups' concave hulls; its critical slope is the dual price. Against that price
every item has a loss, and an item whose loss is no smaller than the gap between the bound and the best plan found
cannot be in a better plan (reduced-cost fixing). What is left, the core, is solved by dynamic programming over lists of
states, group by group from the most ambiguous on, as in D. Pisinger, "A minimal algorithm for the multiple-choice
knapsack problem", EJOR 83 (1995): states may overshoot the budget as long as later groups can pay it back, and each is
bounded by the steepest slope that later groups still offer.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from autopeft.allocation._groups import Group

__all__ = ["Packing", "Relaxation", "relax", "solve"]

_TOLERANCE = 1e-12
"""Relative difference of gains that counts as equal: rounding of sums of some hundred float64."""

_MAX_CELLS = 2_000_000
"""States times items that are expanded at once."""

_MAX_STATES = 40_000_000
"""States kept for walking back, all steps together, before the solver stops with a proven gap."""


@dataclass(frozen=True, slots=True)
class Packing:
    """A packing with its proof.

    Attributes:
        items: item of each group.
        bound: no packing gains more than this; equals the gain when optimal.
        price: gain per further unit of budget in the linear relaxation.
        optimal: whether nothing better exists, up to a relative 1e-12.
    """

    items: tuple[int, ...]
    bound: float
    price: float
    optimal: bool


@dataclass(frozen=True, slots=True)
class Relaxation:
    """The linear relaxation's optimum.

    Attributes:
        base: item of each group, the fractional step left out: costs at most the limit.
        cost: cost of `base`.
        gain: gain of `base`.
        price: slope of the step that does not fit, 0 when everything fits.
        bound: value of the relaxation.
    """

    base: tuple[int, ...]
    cost: int
    gain: float
    price: float
    bound: float


def relax(groups: Sequence[Group], limit: int) -> Relaxation:
    """Take the steepest steps of all concave hulls until one does not fit."""
    steps: list[tuple[float, int, int, int, float]] = []
    for g, group in enumerate(groups):
        costs, gains = group.costs.tolist(), group.gains.tolist()
        hull = _hull(costs, gains)
        for low, high in pairwise(hull):
            rise, run = gains[high] - gains[low], costs[high] - costs[low]
            steps.append((-rise / run, g, high, run, rise))
    steps.sort()
    base = [0] * len(groups)
    spent = 0
    price = 0.0
    for slope, g, high, run, _ in steps:
        if spent + run > limit:
            price = -slope
            break
        base[g] = high
        spent += run
    gain = math.fsum(float(group.gains[i]) for group, i in zip(groups, base, strict=True))
    return Relaxation(tuple(base), spent, gain, price, gain + price * (limit - spent))


def _hull(costs: list[int], gains: list[float]) -> list[int]:
    """Positions of the upper concave hull; costs and gains increase strictly."""
    hull: list[int] = []
    for i in range(len(costs)):
        while len(hull) >= 2:
            a, b = hull[-2], hull[-1]
            # b stays only when the slope drops strictly at it.
            if (gains[b] - gains[a]) * (costs[i] - costs[b]) > (gains[i] - gains[b]) * (costs[b] - costs[a]):
                break
            hull.pop()
        hull.append(i)
    return hull


@dataclass(frozen=True, slots=True, eq=False)
class _Moves:
    """Deviations from the base, flat over groups in the order they are processed.

    Attributes:
        step: position of the group in that order, int64 of shape (m,), increasing.
        item: item of the group.
        cost: cost relative to the base's item, not 0.
        gain: gain relative to the base's item.
        loss: what the linear bound loses by the move, not negative.
        order: group of each step.
    """

    step: Any
    item: Any
    cost: Any
    gain: Any
    loss: Any
    order: Any


@dataclass(slots=True)
class _Best:
    """The best packing so far: a state after some steps, and perhaps one move more."""

    gain: float
    step: int = -1
    state: int = 0
    move: int = -1


def solve(groups: Sequence[Group], limit: int, gap: float = 0.0, seconds: float = math.inf) -> Packing:
    """The packing of largest gain; of several, always the same one.

    Args:
        groups: undominated items, item 0 of each group being (0, 0).
        limit: largest total cost.
        gap: relative gap to the bound at which to stop; 0 proves optimality.
        seconds: time after which to stop with the gap that is proven then.
    """
    deadline = time.perf_counter() + seconds
    relaxed = relax(groups, limit)
    if relaxed.price == 0.0:
        return Packing(relaxed.base, relaxed.gain, 0.0, True)
    moves = _moves(groups, relaxed)
    best, trail, bound = _search(moves, relaxed, limit, gap, deadline)
    items = list(relaxed.base)
    for step, item in _walk_back(moves, best, trail):
        items[moves.order[step]] = item
    gain = math.fsum(float(group.gains[i]) for group, i in zip(groups, items, strict=True))
    optimal = bound <= best.gain
    return Packing(tuple(items), gain if optimal else max(bound, gain), relaxed.price, optimal)


def _moves(groups: Sequence[Group], relaxed: Relaxation) -> _Moves:
    sizes = np.array([len(group.costs) for group in groups])
    owner = np.repeat(np.arange(len(groups)), sizes)
    start = np.concatenate(([0], np.cumsum(sizes)[:-1]))
    item = np.arange(len(owner)) - start[owner]
    base = np.array(relaxed.base)
    costs = np.concatenate([group.costs for group in groups])
    gains = np.concatenate([group.gains for group in groups])
    at = (start + base)[owner]
    away = item != base[owner]
    cost, gain = (costs - costs[at])[away], (gains - gains[at])[away]
    owner, item = owner[away], item[away]
    loss = np.maximum(relaxed.price * cost - gain, 0.0)
    least = np.full(len(groups), np.inf)
    np.minimum.at(least, owner, loss)
    order = np.argsort(least, kind="stable")
    rank = np.empty(len(groups), dtype=np.int64)
    rank[order] = np.arange(len(groups))
    by_step = np.argsort(rank[owner], kind="stable")
    return _Moves(rank[owner][by_step], item[by_step], cost[by_step], gain[by_step], loss[by_step], order)


def _search(
    moves: _Moves, relaxed: Relaxation, limit: int, gap: float, deadline: float
) -> tuple[_Best, list[tuple[Any, Any]], float]:
    """Dynamic programming over the core.

    Returns:
        The best packing, the (parent, move) arrays of each step to walk back by, and an upper bound.
    """
    room = limit - relaxed.cost
    tolerance = _TOLERANCE * relaxed.bound
    n_steps = len(moves.order)
    ends = np.searchsorted(moves.step, np.arange(n_steps + 1))
    up, down = _slopes(moves, n_steps)
    by_cost = np.argsort(moves.cost, kind="stable")

    best = _Best(relaxed.gain)
    trail: list[tuple[Any, Any]] = []
    cost, gain = np.zeros(1, np.int64), np.zeros(1)
    _complete(best, -1, cost, gain, moves, by_cost, room, relaxed.gain)
    stored = 0
    for step in range(n_steps):
        own = slice(ends[step], ends[step + 1])
        usable = np.flatnonzero(moves.loss[own] < relaxed.bound - best.gain - tolerance) + ends[step]
        if len(usable) == 0:
            # Steps come by increasing smallest loss, so no later group can leave its base in a better plan either.
            break
        live = _bounds(cost, gain, room, relaxed.gain, up[step], down[step])
        bound = float(live.max(initial=-math.inf))
        if bound <= best.gain + tolerance:
            break
        if bound - best.gain <= gap * bound or time.perf_counter() > deadline or stored > _MAX_STATES:
            return best, trail, bound
        cost, gain, parent, move = _expand(
            cost, gain, moves, usable, room, relaxed.gain, up[step + 1], down[step + 1], best.gain + tolerance
        )
        trail.append((parent, move))
        stored += len(cost)
        _record(best, step, cost, gain, room, relaxed.gain)
        _complete(best, step, cost, gain, moves, by_cost, room, relaxed.gain)
    return best, trail, best.gain


def _slopes(moves: _Moves, n_steps: int) -> tuple[list[float], list[float]]:
    """Per step, over the groups from there on: the best slope of spending more, the least slope of spending less."""
    up, down = np.zeros(n_steps + 1), np.full(n_steps + 1, np.inf)
    slope = moves.gain / moves.cost
    dearer = moves.cost > 0
    np.maximum.at(up, moves.step[dearer], slope[dearer])
    np.minimum.at(down, moves.step[~dearer], slope[~dearer])
    return np.maximum.accumulate(up[::-1])[::-1].tolist(), np.minimum.accumulate(down[::-1])[::-1].tolist()


def _bounds(cost: Any, gain: Any, room: int, base: float, up: float, down: float) -> Any:
    """Upper bound of what each state can still become."""
    left = room - cost
    over = left < 0
    if math.isinf(down):
        return np.where(over, -np.inf, base + gain + up * left)
    return base + gain + np.where(over, down, up) * left


def _expand(
    cost: Any, gain: Any, moves: _Moves, usable: Any, room: int, base: float, up: float, down: float, floor: float
) -> tuple[Any, Any, Any, Any]:
    """Every state with no move or one of the usable ones; hopeless and dominated ones dropped.

    Returns:
        Costs and gains by increasing cost, the state each came from and the move it made (-1 for none).
    """
    n = len(cost)
    kept = _bounds(cost, gain, room, base, up, down) > floor
    costs, gains = [cost[kept]], [gain[kept]]
    parents, made = [np.flatnonzero(kept)], [np.full(int(kept.sum()), -1, dtype=np.int64)]
    chunk = max(1, _MAX_CELLS // n)
    for first in range(0, len(usable), chunk):
        part = usable[first : first + chunk]
        c = (moves.cost[part][:, None] + cost[None, :]).ravel()
        v = (moves.gain[part][:, None] + gain[None, :]).ravel()
        kept = np.flatnonzero(_bounds(c, v, room, base, up, down) > floor)
        costs.append(c[kept])
        gains.append(v[kept])
        parents.append(kept % n)
        made.append(part[kept // n])
    c, v = np.concatenate(costs), np.concatenate(gains)
    order = np.lexsort((-v, c))
    ranked = v[order]
    before = np.maximum.accumulate(np.concatenate(([-np.inf], ranked[:-1]))) if len(ranked) else ranked
    order = order[ranked > before]
    return c[order], v[order], np.concatenate(parents)[order], np.concatenate(made)[order]


def _record(best: _Best, step: int, cost: Any, gain: Any, room: int, base: float) -> None:
    """The dearest state that fits is the best one: gains increase with costs."""
    last = int(np.searchsorted(cost, room, side="right")) - 1
    if last >= 0 and base + float(gain[last]) > best.gain:
        best.gain, best.step, best.state, best.move = base + float(gain[last]), step, last, -1


def _complete(
    best: _Best, step: int, cost: Any, gain: Any, moves: _Moves, by_cost: Any, room: int, base: float
) -> None:
    """Try each state with the best single move of a later group that then fits."""
    later = by_cost[moves.step[by_cost] > step]
    if len(later) == 0 or len(cost) == 0:
        return
    top = np.maximum.accumulate(moves.gain[later])
    reach = np.searchsorted(moves.cost[later], room - cost, side="right") - 1
    value = np.where(reach >= 0, gain + top[np.maximum(reach, 0)], -np.inf)
    state = int(np.argmax(value))
    if base + float(value[state]) > best.gain:
        move = int(later[int(np.searchsorted(top, top[reach[state]], side="left"))])
        best.gain, best.step, best.state, best.move = base + float(value[state]), step, state, move


def _walk_back(moves: _Moves, best: _Best, trail: list[tuple[Any, Any]]) -> list[tuple[int, int]]:
    """(step, item) of every group that leaves its base."""
    found = [(int(moves.step[best.move]), int(moves.item[best.move]))] if best.move >= 0 else []
    state = best.state
    for step in range(best.step, -1, -1):
        parent, made = trail[step]
        move = int(made[state])
        if move >= 0:
            found.append((step, int(moves.item[move])))
        state = int(parent[state])
    return found
