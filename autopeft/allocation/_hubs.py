"""The knapsack on options that interlock too much to be enumerated, such as those of groups of sites.

An option that takes one place in every layer ties all layers' options together. Yet what excludes what has a simple
shape: once it is decided whether the few widest options (hubs) are bought, the rest falls apart. A tree holds these
decisions: leaves are cells (options that take the same places), `all` nodes have children that do not interfere,
`either` nodes have children of which one is taken. At a price per unit of budget the best set of options is then found
in one pass over the tree, which gives Lagrange's bound, and the price at which the bound is least is the dual price.

The best plan within the cells chosen at that price is nearly always the best there is. What is left to prove it: only
alternatives whose loss at the price is smaller than the gap can be part of a better plan, and each decision about hubs
that survives is one multiple-choice knapsack (`_mckp`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from autopeft.allocation import _mckp
from autopeft.allocation._forest import Forest, Priced, cheapest_bound, family, forest_of
from autopeft.allocation._groups import Group, pareto
from autopeft.core.menu import Option

__all__ = ["HubPacking", "solve"]

_TOLERANCE = 1e-12
"""Relative difference of gains that counts as equal."""

_MAX_PLANS = 256
"""Decisions about hubs that are solved one by one."""

_MAX_SETS = 500_000
"""Compatible sets that are looked at in one small component."""

_SMALL = 48
"""Cells up to which what is left of a component is enumerated rather than decided hub by hub."""


@dataclass(frozen=True, slots=True)
class HubPacking:
    """What was found.

    Attributes:
        chosen: positions of the chosen options, increasing.
        bound: no choice gains more.
        price: gain per further unit of budget at the bound.
    """

    chosen: tuple[int, ...]
    bound: float
    price: float


def solve(
    options: Sequence[Option], costs: Any, gains: Any, limit: int, gap: float = 0.0, seconds: float = math.inf
) -> HubPacking | None:
    """The choice of largest gain; None when more sets would have to be looked at than is worth it.

    Args:
        options: the options in canonical order.
        costs: their costs, int64 of shape (n,).
        gains: their gains, float64 of shape (n,).
        limit: largest total cost.
        gap: relative gap to the bound at which to stop.
        seconds: time after which to stop with the best found.
    """
    deadline = time.perf_counter() + seconds
    try:
        forest = forest_of(options, costs, gains, limit)
        if not forest.cells:
            return HubPacking((), 0.0, 0.0)
        priced = cheapest_bound(forest, limit)
        tolerance = _TOLERANCE * priced.bound
        best = _Plans(limit, gap, deadline)
        best.take([forest.cells[i] for i in family(forest, priced)], priced.bound)
        plans = _plans(forest, priced, best.gain + tolerance)
        for bound, nodes in sorted(plans, key=lambda plan: -plan[0]):
            slack = bound - best.gain
            if slack <= max(tolerance, gap * bound):
                best.left = max(best.left, bound if slack > tolerance else 0.0)
                continue
            best.take([g for i in nodes for g in _pieces(forest, priced, i, slack, limit)], bound)
    except OverflowError:
        return None
    return HubPacking(tuple(sorted(best.chosen)), max(best.gain, best.left), priced.price)


class _Plans:
    """The best plan so far.

    Attributes:
        gain: its gain.
        chosen: positions of its options.
        left: what a plan that was not looked at could gain at most; 0 when there is none.
    """

    def __init__(self, limit: int, gap: float, deadline: float) -> None:
        self.gain, self.chosen, self.left = 0.0, list[int](), 0.0
        self._limit, self._gap, self._deadline = limit, gap, deadline
        self._first = True

    def take(self, groups: list[Group], bound: float) -> None:
        """Solve one multiple-choice knapsack, known to gain `bound` at most."""
        seconds = self._deadline - time.perf_counter()
        if not self._first and seconds <= 0:
            self.left = max(self.left, bound)
            return
        found = _mckp.solve(groups, self._limit, self._gap, max(seconds, 0.0))
        if not self._first and not found.optimal:
            self.left = max(self.left, min(found.bound, bound))
        self._first = False
        picks = [i for group, item in zip(groups, found.items, strict=True) for i in group.picks[item].tolist()]
        gain = math.fsum(float(g.gains[i]) for g, i in zip(groups, found.items, strict=True))
        if gain > self.gain:
            self.gain, self.chosen = gain, [i for i in picks if i >= 0]


def _plans(forest: Forest, priced: Priced, floor: float) -> list[tuple[float, list[int]]]:
    """Bound and nodes of every decision about hubs that may lead to more than `floor`.

    Decisions in components of few cells are left to `_pieces`.
    """
    done: list[tuple[float, list[int]]] = []
    stack: list[tuple[float, list[int], list[int]]] = [(priced.bound, [], list(forest.roots))]
    while stack:
        bound, ready, todo = stack.pop()
        while todo:
            i = todo.pop()
            node = forest.nodes[i]
            if node.kind == "all":
                todo.extend(node.children)
            elif node.kind == "leaf" or node.size <= _SMALL:
                ready.append(i)
            else:
                for child in node.children:
                    below = bound - (priced.value[i] - priced.value[child])
                    if below > floor:
                        stack.append((below, list(ready), [*todo, child]))
                break
        else:
            done.append((bound, ready))
            if len(done) > _MAX_PLANS:
                raise OverflowError(f"more than {_MAX_PLANS:,} decisions about hubs")
    return done


def _pieces(forest: Forest, priced: Priced, i: int, slack: float, limit: int) -> Iterator[Group]:
    """Groups of a node that hold every set of options whose loss at the price is within the slack."""
    node = forest.nodes[i]
    if node.kind == "leaf":
        yield forest.cells[node.cell]
    elif node.kind == "all":
        for child in node.children:
            yield from _pieces(forest, priced, child, slack, limit)
    else:
        alive = [c for c in node.children if priced.value[i] - priced.value[c] <= slack]
        if len(alive) == 1:
            yield from _pieces(forest, priced, alive[0], slack, limit)
        else:
            front = _front(forest, priced, i, slack, limit)
            nothing = Group(np.zeros(1, np.int64), np.zeros(1), np.full((1, front.picks.shape[1]), -1))
            yield _union([nothing, front])


def _front(forest: Forest, priced: Priced, i: int, slack: float, limit: int) -> Group:
    """The undominated sets below a node whose loss at the price is within the slack."""
    node, value = forest.nodes[i], priced.value
    if node.kind == "leaf":
        cell = forest.cells[node.cell]
        near = value[i] - (cell.gains - priced.price * cell.costs) <= slack
        return Group(cell.costs[near], cell.gains[near], cell.picks[near])
    if node.kind == "either":
        alive = [c for c in node.children if value[i] - value[c] <= slack]
        return _union([_front(forest, priced, c, slack - (value[i] - value[c]), limit) for c in alive])
    total = Group(np.zeros(1, np.int64), np.zeros(1), np.empty((1, 0), np.int64))
    reached = 0.0
    for child in node.children:
        own = _front(forest, priced, child, slack, limit)
        reached += value[child]
        if len(total.costs) * len(own.costs) > _MAX_SETS:
            raise OverflowError(f"more than {_MAX_SETS:,} compatible sets")
        costs = (total.costs[:, None] + own.costs[None, :]).ravel()
        gains = (total.gains[:, None] + own.gains[None, :]).ravel()
        near = np.flatnonzero((reached - (gains - priced.price * costs) <= slack) & (costs <= limit))
        kept = near[pareto(costs[near], gains[near], -1.0)]
        left, right = kept // len(own.costs), kept % len(own.costs)
        total = Group(costs[kept], gains[kept], np.concatenate((total.picks[left], own.picks[right]), axis=1))
    return total


def _union(parts: list[Group]) -> Group:
    width = max(part.picks.shape[1] for part in parts)
    costs = np.concatenate([part.costs for part in parts])
    gains = np.concatenate([part.gains for part in parts])
    padded = [np.pad(p.picks, ((0, 0), (0, width - p.picks.shape[1])), constant_values=-1) for p in parts]
    kept = pareto(costs, gains, -1.0)
    return Group(costs[kept], gains[kept], np.concatenate(padded)[kept])
