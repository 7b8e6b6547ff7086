"""Options to groups: in each group at most one item is taken, and groups do not interfere.

Options that share places, directly or through others, form a component. A component whose options exclude each other
is a group as it is. In a mixed component (a fused projection whole or by slices, a norm's weight and bias together or
apart) every compatible set of options becomes one item, dominated ones pruned along the way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from autopeft.core.menu import Option
from autopeft.core.site import Place

__all__ = ["Group", "cells_of", "components", "group_of", "group_options", "pareto", "plain"]

_MAX_SETS = 50_000
"""Compatible sets that may be looked at in one component before the problem goes to `_hubs`."""


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """The undominated items of one component.

    Attributes:
        costs: int64 of shape (n,), strictly increasing from 0: item 0 buys nothing, or only what costs nothing in the
            budget's unit.
        gains: float64 of shape (n,), strictly increasing, not negative.
        picks: int64 of shape (n, k): positions of the item's options, -1 where it has fewer than k.
    """

    costs: Any
    gains: Any
    picks: Any


def pareto(costs: Any, gains: Any, floor: float = 0.0) -> Any:
    """Positions of the undominated items by increasing cost.

    An item stays when it gains more than `floor` and than every item that costs as much or less. Of equal items the
    first stays, so that ties break by the order of the arguments.
    """
    order = np.lexsort((-gains, costs))
    ranked = gains[order]
    before = np.maximum.accumulate(np.concatenate(([floor], ranked[:-1])))
    kept: Any = order[ranked > before]
    return kept


def group_options(options: Sequence[Option], costs: Any, gains: Any, limit: int) -> list[Group] | None:
    """Groups of the options in their order; None when a component has too many compatible sets to look at.

    Args:
        options: the options in canonical order.
        costs: their costs, int64 of shape (n,).
        gains: their gains, float64 of shape (n,).
        limit: items that cost more are left out.
    """
    cells = cells_of(options, costs, gains, limit)
    groups = []
    for component in components(list(cells)):
        group = group_of({places: cells[places] for places in component}, costs, gains, limit)
        if group is None:
            return None
        groups.append(group)
    return groups


def group_of(cells: Mapping[tuple[Place, ...], Sequence[int]], costs: Any, gains: Any, limit: int) -> Group | None:
    """The group of a component, given by its cells; None when it has too many compatible sets to look at."""
    component = list(cells)
    members = [np.array(cells[places], dtype=np.int64) for places in component]
    if len(component) == 1 or _exclusive(component):
        return plain(np.concatenate(members), costs, gains)
    return _mixed(component, members, costs, gains, limit)


def cells_of(options: Sequence[Option], costs: Any, gains: Any, limit: int) -> dict[tuple[Place, ...], list[int]]:
    """Places to the positions of the options that take exactly these, gain something and fit into the limit."""
    cells: dict[tuple[Place, ...], list[int]] = {}
    for i in np.flatnonzero((gains > 0) & (costs <= limit)).tolist():
        cells.setdefault(options[i].places, []).append(i)
    return cells


def components(keys: list[tuple[Place, ...]]) -> list[list[tuple[Place, ...]]]:
    """Sets of places that hang together, in the order of their first member."""
    root: dict[Place, Place] = {}

    def find(place: Place) -> Place:
        while root[place] != place:
            root[place] = root[root[place]]
            place = root[place]
        return place

    for places in keys:
        for place in places:
            root.setdefault(place, place)
        for place in places[1:]:
            root[find(place)] = find(places[0])
    found: dict[Place, list[tuple[Place, ...]]] = {}
    for places in keys:
        found.setdefault(find(places[0]), []).append(places)
    return list(found.values())


def _exclusive(component: list[tuple[Place, ...]]) -> bool:
    sets = [frozenset(places) for places in component]
    return all(a & b for i, a in enumerate(sets) for b in sets[:i])


def plain(members: Any, costs: Any, gains: Any) -> Group:
    """The group of options that exclude each other, given by their positions."""
    members = np.sort(members)
    kept = members[pareto(costs[members], gains[members])]
    if costs[kept[0]] == 0:
        return Group(costs[kept], gains[kept], kept[:, None])
    return Group(
        np.concatenate(([0], costs[kept])),
        np.concatenate(([0.0], gains[kept])),
        np.concatenate(([[-1]], kept[:, None])),
    )


def _mixed(component: list[tuple[Place, ...]], members: list[Any], costs: Any, gains: Any, limit: int) -> Group | None:
    """One item per undominated compatible set, by dynamic programming over the cells of the component.

    The state is the set of occupied places that later cells still ask for; each state keeps its Pareto front.
    """
    bit = {place: 1 << i for i, place in enumerate(sorted({p for places in component for p in places}))}
    masks = [sum(bit[p] for p in places) for places in component]
    width = len(component)
    fronts: dict[int, Group] = {0: Group(np.zeros(1, np.int64), np.zeros(1), np.full((1, width), -1, dtype=np.int64))}
    looked_at = 0
    for position, (mask, cell) in enumerate(zip(masks, members, strict=True)):
        later = 0
        for other in masks[position + 1 :]:
            later |= other
        kept = cell[pareto(costs[cell], gains[cell])]
        reached: dict[int, list[Group]] = {}
        for taken, front in fronts.items():
            reached.setdefault(taken & later, []).append(front)
            if taken & mask:
                continue
            looked_at += len(front.costs) * len(kept)
            if looked_at > _MAX_SETS:
                return None
            reached.setdefault((taken | mask) & later, []).append(_extended(front, kept, position, costs, gains, limit))
        fronts = {taken: _front(parts) for taken, parts in reached.items()}
    return fronts[0]


def _extended(front: Group, kept: Any, position: int, costs: Any, gains: Any, limit: int) -> Group:
    """Every item of the front with every option of one cell added, within the limit."""
    total = (front.costs[:, None] + costs[kept][None, :]).ravel()
    gain = (front.gains[:, None] + gains[kept][None, :]).ravel()
    fits = np.flatnonzero(total <= limit)
    picks = front.picks[fits // len(kept)]
    picks[:, position] = kept[fits % len(kept)]
    return Group(total[fits], gain[fits], picks)


def _front(parts: list[Group]) -> Group:
    costs = np.concatenate([part.costs for part in parts])
    gains = np.concatenate([part.gains for part in parts])
    picks = np.concatenate([part.picks for part in parts])
    # A state that is reached only with something taken has no item 0; -1 lets its cheapest item stay.
    kept = pareto(costs, gains, -1.0)
    return Group(costs[kept], gains[kept], picks[kept])
