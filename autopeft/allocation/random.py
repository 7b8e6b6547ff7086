"""Random feasible mixes: what any search has to beat."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from autopeft.core.allocation import Allocation, Provenance
from autopeft.core.budget import Budget
from autopeft.core.menu import Menu, Option
from autopeft.core.site import Place
from autopeft.errors import InfeasibleBudget

__all__ = ["RandomMix"]


@dataclass(frozen=True, slots=True)
class RandomMix:
    """A random plan that spends as much as fits.

    Every pair of a site and a method is visited once, in random order; where its places are free and something fits,
    one of the sizes that fit is drawn. Then the bought options are visited again, in random order, and each grows to
    the largest size that what is left can pay for. In the end no option of the menu can be added and none can grow.
    Gains are not looked at.
    """

    def allocate(self, menu: Menu, budget: Budget, seed: int = 0) -> Allocation:
        """A plan that depends on the seed, the menu's content and the budget alone.

        Raises:
            InfeasibleBudget: when the menu is not empty and its cheapest option costs more than the budget.
        """
        generator = np.random.default_rng([seed, 0x52414E44])
        pairs: dict[tuple[str, str, tuple[Place, ...]], list[tuple[int, Option]]] = {}
        for option in sorted(menu.options, key=lambda o: o.order):
            key = (option.site, option.method, option.places)
            pairs.setdefault(key, []).append((option.cost.of(budget.unit), option))
        keys = list(pairs)
        taken: set[Place] = set()
        chosen: dict[tuple[str, str, tuple[Place, ...]], tuple[int, Option]] = {}
        left = budget.limit
        for i in generator.permutation(len(keys)).tolist():
            key = keys[i]
            fitting = [item for item in pairs[key] if item[0] <= left]
            if not fitting or taken & set(key[2]):
                continue
            chosen[key] = fitting[int(generator.integers(len(fitting)))]
            taken |= set(key[2])
            left -= chosen[key][0]
        if pairs and not chosen:
            cost, option = min((item for items in pairs.values() for item in items), key=lambda i: (i[0], i[1].order))
            raise InfeasibleBudget(
                f"a budget of {budget} buys nothing: the cheapest option, {option.method} of size {option.size} at "
                f"{option.site}, costs {cost:,}",
                cost,
            )
        bought = list(chosen)
        for i in generator.permutation(len(bought)).tolist():
            key = bought[i]
            cost = chosen[key][0]
            larger = [item for item in pairs[key] if cost < item[0] <= cost + left]
            if larger:
                chosen[key] = max(larger, key=lambda item: (item[0], item[1].size))
                left -= chosen[key][0] - cost
        return Allocation(tuple(o for _, o in chosen.values()), budget, Provenance(f"random(seed={seed})"))
