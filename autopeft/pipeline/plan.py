"""From scores and knobs to a plan within the budget."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from autopeft.allocation.gain import build_menu
from autopeft.allocation.indices import attach_indices
from autopeft.allocation.knapsack import Knapsack
from autopeft.allocation.spt import SPT
from autopeft.core.allocation import Allocation
from autopeft.core.menu import Menu, Option
from autopeft.core.places import places_of
from autopeft.errors import InfeasibleBudget

if TYPE_CHECKING:
    from autopeft.config.study import Study
    from autopeft.pipeline.prepare import Prepared

__all__ = ["make_menu", "make_plan"]


def make_menu(prepared: Prepared, study: Study) -> Menu:
    """Every option of the study's methods, with its price and its corrected gain.

    Options that cost more than the share of the budget that the study spends are on it too; no allocator buys them.

    Raises:
        InfeasibleBudget: when not even the cheapest option fits the budget.
    """
    menu = build_menu(
        prepared.catalog,
        study.methods,
        prepared.scores_for(study),
        study.gain,
        fused=study.fused,
        budget=prepared.budget,
        energies=prepared.energies(study),
    )
    if not len(menu):
        raise _too_small(prepared, study)
    return menu


def make_plan(prepared: Prepared, study: Study | None = None) -> Allocation:
    """The study's allocator on the study's menu, with the entries of sparse options filled in.

    Raises:
        InfeasibleBudget: when the budget buys nothing.
    """
    study = study or prepared.study
    menu = make_menu(prepared, study)
    allocator = study.allocator
    if isinstance(allocator, SPT) and not allocator.methods:
        # It prices modules and vectors itself, and must not buy a method that this study does not have.
        allocator = dataclasses.replace(allocator, methods=study.methods)
    # Rounded down, and never to nothing: what fits a share fits the budget.
    limit = max(1, math.floor(prepared.budget.limit * study.spend))
    budget = prepared.budget if study.spend == 1 else dataclasses.replace(prepared.budget, limit=limit)
    try:
        allocation = allocator.allocate(menu, budget, study.seed)
    except InfeasibleBudget:
        if not isinstance(allocator, Knapsack):
            raise
        # The menu leaves out what is dearer than the budget; what would be needed may be among that.
        raise allocator.refusal(_prices(prepared, study), budget) from None
    return attach_indices(allocation, study.methods, prepared.scores_for(study), menu.sites)


def _prices(prepared: Prepared, study: Study) -> Menu:
    """Every option whatever it costs, without a predicted gain."""
    sites = {site.name: site for site in prepared.catalog.offered(study.fused)}
    options = [
        Option(site.name, key, size, method.cost(site, size), 0.0, places)
        for site in sites.values()
        for key, method in study.methods.items()
        if (places := places_of(prepared.catalog, method, site)) and (method.mergeable(site) or not study.mergeable)
        for size in method.sizes(site)
    ]
    return Menu(tuple(options), sites)


def _too_small(prepared: Prepared, study: Study) -> InfeasibleBudget:
    budget = prepared.budget
    cheapest: tuple[int, str, str, int] | None = None
    for site in prepared.catalog.offered(study.fused):
        for key, method in study.methods.items():
            offered = method.slots(site) and (method.mergeable(site) or not study.mergeable)
            if offered and (sizes := method.sizes(site)):
                cost = method.cost(site, sizes[0]).of(budget.unit)
                if cheapest is None or cost < cheapest[0]:
                    cheapest = (cost, key, site.name, sizes[0])
    if cheapest is None:
        return InfeasibleBudget(f"none of the methods {', '.join(study.methods)} can be used on this model")
    cost, key, site_name, size = cheapest
    return InfeasibleBudget(
        f"a budget of {budget} buys nothing: the cheapest option is {key!r} of size {size} at {site_name!r} for "
        f"{cost:,}. Raise the budget to at least {cost:,} or add a cheaper method.",
        cost,
    )
