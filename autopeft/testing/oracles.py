"""Slow, obvious solutions of problems that the product solves fast."""

from __future__ import annotations

from itertools import product

import numpy as np

from autopeft.core.budget import Budget, Cost
from autopeft.core.menu import Menu, Option
from autopeft.core.site import Place, Site

__all__ = ["best_by_enumeration", "best_by_table", "random_menu", "stated_optimum"]


def best_by_enumeration(menu: Menu, budget: Budget) -> float:
    """Largest gain of any set of options that fits and in which no two share a place.

    Every set is looked at, by recursion over the options: at most some twenty options, please.
    """
    options = menu.options

    def best(i: int, left: int, taken: frozenset[Place]) -> float:
        if i == len(options):
            return 0.0
        without = best(i + 1, left, taken)
        o = options[i]
        cost = o.cost.of(budget.unit)
        if cost > left or taken & set(o.places):
            return without
        return max(without, o.gain + best(i + 1, left - cost, taken | set(o.places)))

    return best(0, budget.limit, frozenset())


def best_by_table(menu: Menu, budget: Budget) -> float:
    """Largest gain by the textbook table over every budget from 0 on; for menus whose options take one place each.

    `best[b]` after a place is the maximum over its options of `best[b - cost] + gain`, and of buying nothing there.
    """
    places: dict[Place, list[Option]] = {}
    for o in menu.options:
        if len(o.places) != 1:
            raise ValueError(f"the table holds options of one place each, {o.key} takes {len(o.places)}")
        places.setdefault(o.places[0], []).append(o)
    best = np.zeros(budget.limit + 1)
    for options in places.values():
        after = best.copy()
        for o in options:
            cost = o.cost.of(budget.unit)
            if cost <= budget.limit:
                after[cost:] = np.maximum(after[cost:], best[: budget.limit + 1 - cost] + o.gain)
        best = after
    return float(best[-1])


def random_menu(
    seed: int,
    *,
    sites: int = 4,
    sizes: int = 2,
    several: bool = True,
    integers: bool = True,
    largest_cost: int = 12,
) -> Menu:
    """A small menu that is awkward on purpose.

    Whole gains from -1 to 5 make ties, zero and negative gains common; options of two and three places interlock
    sites; some options cost more than any sensible budget.

    Args:
        seed: seed of everything.
        sites: number of sites, each with places `weight` and `bias`.
        sizes: options per site and method.
        several: whether some options take several places.
        integers: whole gains; else real ones from the same range.
        largest_cost: costs are drawn from 1 to here, one in ten is multiplied by 20.
    """
    rng = np.random.default_rng(seed)
    options = []
    for i, slot in product(range(sites), ("weight", "bias")):
        if rng.random() < 0.25:
            continue
        for size in range(1, 1 + int(rng.integers(1, sizes + 1))):
            own = {Place(f"site{i}", "weight" if slot == "weight" else "bias")}
            method = slot
            if several and rng.random() < 0.4:
                own |= {Place(f"site{i}", "bias")}
                method = "pair"
                if rng.random() < 0.5:
                    own |= {Place(f"site{(i + 1) % sites}", "weight")}
            cost = int(rng.integers(1, largest_cost + 1)) * (20 if rng.random() < 0.1 else 1)
            gain = float(rng.integers(-1, 6)) if integers else float(rng.uniform(-1, 5))
            key = f"{method}-{slot}"
            options.append(Option(f"site{i}", key, size, Cost.plain(cost, cost), gain, tuple(sorted(own))))
    listed = {
        f"site{i}": Site(f"site{i}", f"site{i}", "linear", (4, 4), True, i, "mlp.fc1", ("weight", "bias"))
        for i in range(sites)
    }
    return Menu(tuple(options), listed)


def stated_optimum(menu: Menu, budget: Budget) -> float:
    """The optimum by the table where it applies, else by enumeration."""
    single = all(len(o.places) == 1 for o in menu.options)
    return best_by_table(menu, budget) if single else best_by_enumeration(menu, budget)
