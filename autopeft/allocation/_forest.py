"""Trees of decisions about options that interlock, and what they are worth at a price per unit of budget."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from autopeft.allocation._groups import Group, cells_of, components, plain
from autopeft.core.menu import Option
from autopeft.core.site import Place

__all__ = ["Forest", "Node", "Priced", "bits", "cheapest_bound", "family", "forest_of"]

_TOLERANCE = 1e-12
"""Relative difference of gains that counts as equal."""

_MAX_NODES = 50_000
"""Nodes of the trees of decisions."""

_MAX_STEPS = 100
"""Prices that are tried; some ten are needed."""


@dataclass(frozen=True, slots=True)
class Node:
    """A decision: `leaf` of a cell, `all` or `either` of the children.

    `size` is the largest number of cells that one way of deciding everything below leads to.
    """

    kind: Literal["leaf", "all", "either"]
    children: tuple[int, ...]
    size: int
    cell: int = -1


@dataclass(slots=True)
class Forest:
    """Trees of all components, children before parents.

    Attributes:
        cells: the undominated options of each cell, item 0 buying nothing.
        rivals: per cell, the set of cells that share a place with it, itself included, as a bit mask.
        nodes: the nodes.
        roots: the roots, one per component.
    """

    cells: list[Group]
    rivals: list[int]
    nodes: list[Node] = field(default_factory=list)
    roots: tuple[int, ...] = ()
    known: dict[int, int] = field(default_factory=dict)

    def grow(self, cells: int) -> int:
        """The node of a set of cells, given as a bit mask.

        Raises:
            OverflowError: when there are more nodes than are worth looking at.
        """
        if cells not in self.known:
            parts = self.split(cells)
            if len(parts) == 1:
                self.known[cells] = self._decide(cells)
            else:
                self.known[cells] = self._add("all", [self.grow(part) for part in parts])
        return self.known[cells]

    def split(self, cells: int) -> list[int]:
        """The components of a set of cells."""
        parts = []
        while cells:
            part, edge = 0, cells & -cells
            while edge:
                part |= edge
                reach = 0
                for i in bits(edge):
                    reach |= self.rivals[i]
                edge = reach & cells & ~part
            parts.append(part)
            cells &= ~part
        return parts

    def _decide(self, cells: int) -> int:
        members = list(bits(cells))
        if len(members) == 1:
            return self._add("leaf", [], members[0])
        if all(cells & ~self.rivals[i] == 0 for i in members):
            return self._add("either", [self.grow(1 << i) for i in members])
        hub = max(members, key=lambda i: ((self.rivals[i] & cells).bit_count(), -i))
        left = cells & ~self.rivals[hub]
        taken = [self.grow(1 << hub), *([self.grow(left)] if left else [])]
        return self._add("either", [self.grow(cells & ~(1 << hub)), self._add("all", taken)])

    def _add(self, kind: Literal["leaf", "all", "either"], children: list[int], cell: int = -1) -> int:
        if len(self.nodes) >= _MAX_NODES:
            raise OverflowError(f"more than {_MAX_NODES:,} decisions")
        sizes = [self.nodes[i].size for i in children] or [1]
        size = max(sizes) if kind == "either" else sum(sizes)
        self.nodes.append(Node(kind, tuple(children), size, cell))
        return len(self.nodes) - 1


@dataclass(frozen=True, slots=True, eq=False)
class Priced:
    """The best of every node at one price.

    Attributes:
        price: gain that a unit of budget is worth.
        value: per node, largest gain less price times cost.
        pick: per `either` node, the child of largest value; per leaf, the cell's item.
        bound: no plan gains more than this.
        gain: gain of the best plan at this price, whatever it costs.
        cost: its cost.
    """

    price: float
    value: list[float]
    pick: list[int]
    bound: float
    gain: float
    cost: int


def forest_of(options: Sequence[Option], costs: Any, gains: Any, limit: int) -> Forest:
    cells = cells_of(options, costs, gains, limit)
    position = {places: i for i, places in enumerate(cells)}
    holders: dict[Place, int] = {}
    for places, i in position.items():
        for place in places:
            holders[place] = holders.get(place, 0) | 1 << i
    rivals = [0] * len(cells)
    for places, i in position.items():
        for place in places:
            rivals[i] |= holders[place]
    forest = Forest([plain(np.array(members), costs, gains) for members in cells.values()], rivals)
    whole = [sum(1 << position[places] for places in component) for component in components(list(cells))]
    forest.roots = tuple(forest.grow(part) for part in whole)
    return forest


def bits(mask: int) -> Iterator[int]:
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


class _Pricing:
    """Values the nodes at a price."""

    def __init__(self, forest: Forest, limit: int) -> None:
        self.forest, self.limit = forest, limit
        self._costs = np.concatenate([g.costs for g in forest.cells])
        self._gains = np.concatenate([g.gains for g in forest.cells])
        sizes = np.array([len(g.costs) for g in forest.cells])
        self._start = np.concatenate(([0], np.cumsum(sizes)[:-1]))
        self._owner = np.repeat(np.arange(len(sizes)), sizes)

    def at(self, price: float) -> Priced:
        """One pass over the nodes; of equal values the first is taken."""
        worth = self._gains - price * self._costs
        top = np.maximum.reduceat(worth, self._start)
        hits = np.flatnonzero(worth == top[self._owner])
        _, first = np.unique(self._owner[hits], return_index=True)
        item = (hits[first] - self._start).tolist()
        best = top.tolist()
        value, pick = [0.0] * len(self.forest.nodes), [0] * len(self.forest.nodes)
        for i, node in enumerate(self.forest.nodes):
            if node.kind == "leaf":
                value[i], pick[i] = best[node.cell], item[node.cell]
            elif node.kind == "all":
                value[i] = math.fsum(value[k] for k in node.children)
            else:
                pick[i] = max(node.children, key=value.__getitem__)
                value[i] = value[pick[i]]
        bound = math.fsum([price * self.limit, *(value[i] for i in self.forest.roots)])
        priced = Priced(price, value, pick, bound, 0.0, 0)
        chosen = [(self.forest.cells[self.forest.nodes[i].cell], pick[i]) for i in _leaves(self.forest, priced)]
        gain = math.fsum(float(g.gains[k]) for g, k in chosen)
        return Priced(price, value, pick, bound, gain, sum(int(g.costs[k]) for g, k in chosen))


def cheapest_bound(forest: Forest, limit: int) -> Priced:
    """The price at which the bound is least: where the lines of a plan that is too dear and of one that fits meet."""
    pricing = _Pricing(forest, limit)
    dear = pricing.at(0.0)
    if dear.cost <= limit:
        return dear
    steepest = max(float((g.gains[1:] / np.maximum(g.costs[1:], 1)).max(initial=0.0)) for g in forest.cells)
    fits = pricing.at(2 * steepest)
    best = min(dear, fits, key=lambda p: p.bound)
    for _ in range(_MAX_STEPS):
        if fits.cost >= dear.cost:
            break
        price = (dear.gain - fits.gain) / (dear.cost - fits.cost)
        if not fits.price > price > dear.price:
            break
        here = pricing.at(price)
        best = min(best, here, key=lambda p: p.bound)
        meeting = fits.gain + price * (limit - fits.cost)
        if here.bound <= meeting + _TOLERANCE * abs(meeting):
            break
        if here.cost > limit:
            dear = here
        else:
            fits = here
    return best


def _leaves(forest: Forest, priced: Priced) -> Iterator[int]:
    """The leaves that the decisions of largest value lead to."""
    stack = list(reversed(forest.roots))
    while stack:
        i = stack.pop()
        node = forest.nodes[i]
        if node.kind == "leaf":
            yield i
        elif node.kind == "all":
            stack.extend(reversed(node.children))
        else:
            stack.append(priced.pick[i])


def family(forest: Forest, priced: Priced) -> list[int]:
    return [forest.nodes[i].cell for i in _leaves(forest, priced)]
