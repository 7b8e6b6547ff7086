"""From scores and knobs to a plan within the budget."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from autopeft.allocation.gain import build_menu
from autopeft.allocation.indices import attach_indices
from autopeft.allocation.knapsack import Knapsack
from autopeft.allocation.spt import SPT
from autopeft.core.allocation import Allocation
from autopeft.core.budget import Budget
from autopeft.core.contracts import Allocator
from autopeft.core.menu import Menu
from autopeft.errors import InfeasibleBudget, UsageError
from autopeft.pipeline.prices import every_option
from autopeft.pipeline.targets import limited_menus

if TYPE_CHECKING:
    from autopeft.config.study import Study
    from autopeft.pipeline.prepare import Prepared

__all__ = ["best_of", "make_menu", "make_plan"]


def make_menu(prepared: Prepared, study: Study) -> Menu:
    """Every option of the study's methods, with its price and its corrected gain.

    Options that cost more than the share of the budget that the study spends are on it too; no allocator buys them.

    Raises:
        InfeasibleBudget: when not even the cheapest option fits the budget, or memorisation has a price that no option
            is worth.
        UsageError: when memorisation has a price and the scorer measured nothing of it.
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
        if study.gain.price and prepared.energies(study).options:
            raise InfeasibleBudget(
                f"at gain.price={study.gain.price:g} no option is worth the memorisation that it is predicted to add; "
                "lower the price"
            )
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
    if isinstance(allocator, SPT) and (study.limits.target != "any" or study.limits.max_rank is not None):
        raise UsageError(
            "SPT chooses by its own prices and keeps neither limits.target nor limits.max_rank; the allocator knapsack "
            "does"
        )
    if isinstance(allocator, SPT) and not allocator.methods:
        # It prices modules and vectors itself, and must not buy a method that this study does not have.
        allocator = dataclasses.replace(allocator, methods=study.methods)
    # Rounded down, and never to nothing: what fits a share fits the budget.
    limit = max(1, math.floor(prepared.budget.limit * study.spend))
    budget = prepared.budget if study.spend == 1 else dataclasses.replace(prepared.budget, limit=limit)
    try:
        allocation = best_of(allocator, limited_menus(prepared, study, menu), budget, study.seed)
    except InfeasibleBudget:
        if not isinstance(allocator, Knapsack):
            raise
        # The menu leaves out what is dearer than the budget; what would be needed may be among that.
        dearer = limited_menus(prepared, study, every_option(prepared, study))
        refusals = [allocator.refusal(part, budget) for part in dearer]
        raise min(refusals, key=lambda e: math.inf if e.cheapest is None else e.cheapest) from None
    return attach_indices(allocation, study.methods, prepared.scores_for(study), menu.sites)


def best_of(allocator: Allocator, menus: Sequence[Menu], budget: Budget, seed: int) -> Allocation:
    """The best plan of any of the menus; its bound holds for all of them.

    Raises:
        InfeasibleBudget: when none of them has a plan.
        UsageError: when the allocator does not keep a cap.
    """
    plans, refusals = [], []
    for menu in menus:
        try:
            plans.append((menu, allocator.allocate(menu, budget, seed)))
        except InfeasibleBudget as error:
            refusals.append(error)
    if not plans:
        raise refusals[0]
    menu, best = max(plans, key=lambda pair: pair[1].worth)
    for cap in menu.caps:
        if (used := cap.used(best)) > cap.most:
            raise UsageError(
                f"{best.provenance.allocator or type(allocator).__name__} made a plan with {used:,.6g} of the "
                f"{cap.most:,.6g} allowed for {cap.name}; the allocator knapsack keeps such limits"
            )
    bounds = [plan.provenance.bound for _, plan in plans]
    if len(plans) > 1 and None not in bounds:
        bound = max(bound for bound in bounds if bound is not None)
        best = dataclasses.replace(best, provenance=dataclasses.replace(best.provenance, bound=bound))
    return best


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
