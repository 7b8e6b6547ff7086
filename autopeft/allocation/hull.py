"""Diminishing returns within one place: the options on the concave hull of its gains."""

from __future__ import annotations

from collections.abc import Iterable

from autopeft.core.budget import Budget
from autopeft.core.menu import Option
from autopeft.core.site import Place

__all__ = ["on_hull"]


def on_hull(options: Iterable[Option], budget: Budget) -> tuple[Option, ...]:
    """The options that some price per unit of budget would buy at their place.

    For each site, method and set of places, the vertices of the upper concave hull of the points (cost, gain) and of
    buying nothing, (0, 0): from one to the next the gain per unit falls. What lies on a line between two vertices, or
    below it, is left out, and so is what gains nothing. A menu of these alone packs faster, and at small budgets a
    little worse, since a plan may need a size between two vertices to spend what is left.

    Args:
        options: options of any sites, in any order.
        budget: in whose unit costs are counted.
    """
    curves: dict[tuple[str, str, tuple[Place, ...]], list[Option]] = {}
    for option in options:
        curves.setdefault((option.site, option.method, option.places), []).append(option)
    kept: list[Option] = []
    for curve in curves.values():
        hull: list[tuple[int, float, Option | None]] = [(0, 0.0, None)]
        for option in sorted(curve, key=lambda o: (o.cost.of(budget.unit), -o.gain, o.order)):
            cost, gain = option.cost.of(budget.unit), option.gain
            if gain <= hull[-1][1]:
                continue
            while len(hull) > 1 and _below(hull[-2], hull[-1], (cost, gain, option)):
                hull.pop()
            hull.append((cost, gain, option))
        kept += [option for _, _, option in hull if option is not None]
    return tuple(sorted(kept, key=lambda o: o.order))


def _below(
    first: tuple[int, float, Option | None],
    middle: tuple[int, float, Option | None],
    last: tuple[int, float, Option | None],
) -> bool:
    """Whether the middle point lies on or below the line between the others."""
    return (middle[1] - first[1]) * (last[0] - first[0]) <= (last[1] - first[1]) * (middle[0] - first[0])
