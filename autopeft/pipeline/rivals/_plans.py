"""What several contenders need: methods that the study lacks, menus without gains, uniform plans on what fits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from autopeft.allocation.indices import attach_indices
from autopeft.allocation.uniform import Uniform
from autopeft.config.registries import METHODS
from autopeft.core.allocation import Allocation
from autopeft.core.contracts import Method
from autopeft.core.menu import Menu, Option
from autopeft.core.places import places_of
from autopeft.core.site import Fused
from autopeft.errors import InfeasibleBudget
from autopeft.methods.hf_peft import HfPeft

if TYPE_CHECKING:
    from autopeft.config.study import Study
    from autopeft.pipeline.prepare import Prepared

__all__ = ["brought", "first_feasible", "last_blocks", "priced_menu", "uniform_plan", "variants"]


def brought(study: Study, keys: Iterable[str]) -> dict[str, Method]:
    """The study's methods of these keys, and the built-in ones (or PEFT's types) where it has none."""
    found: dict[str, Method] = {}
    for key in keys:
        if key in study.methods:
            found[key] = study.methods[key]
        elif key in METHODS:
            found[key] = METHODS[key]()
        else:
            found[key] = HfPeft(key)
    return found


def variants(named: Iterable[tuple[str, Callable[[], Allocation]]]) -> list[tuple[str, Allocation]]:
    """The plans that the budget can express and that buy something.

    Raises:
        InfeasibleBudget: the last reason, when there is none.
    """
    found: list[tuple[str, Allocation]] = []
    reason = InfeasibleBudget("there is nothing that it could be put on")
    for name, make in named:
        try:
            allocation = make()
        except InfeasibleBudget as error:
            reason = error
            continue
        if len(allocation):
            found.append((name, allocation))
    if not found:
        raise reason
    return found


def priced_menu(prepared: Prepared, study: Study, methods: Mapping[str, Method], fused: Fused) -> Menu:
    """Options with prices and no predicted gains, for allocators that do not look at gains."""
    sites = {site.name: site for site in prepared.catalog.offered(fused)}
    options = []
    for key, method in methods.items():
        for site in sites.values():
            places = places_of(prepared.catalog, method, site)
            if not places or (study.mergeable and not method.mergeable(site)):
                continue
            for size in method.sizes(site):
                cost = method.cost(site, size)
                if cost.of(prepared.budget.unit) > prepared.budget.limit:
                    break
                options.append(Option(site.name, key, size, cost, 0.0, places))
    return Menu(tuple(options), sites)


def last_blocks(menu: Menu, first_depth: int) -> Menu:
    """What of the menu lies in the blocks from this depth on."""
    sites = {name: site for name, site in menu.sites.items() if site.depth >= first_depth}
    return Menu(tuple(o for o in menu.options if o.site in sites), sites, menu.scores)


def first_feasible(
    prepared: Prepared, name: str, menu: Menu, spend: Callable[[Menu], Allocation]
) -> tuple[str, Allocation]:
    """A plan on every block, or on as many of the last blocks as the budget reaches, and what it is called.

    Raises:
        InfeasibleBudget: when not even the last block can be paid for.
    """
    depth = prepared.catalog.n_depth
    for first in range(depth):
        part = menu if first == 0 else last_blocks(menu, first)
        where = "" if first == 0 else f", last {depth - first} of {depth} blocks"
        try:
            return name + where, spend(part)
        except InfeasibleBudget as error:
            reason = error
    raise reason


def uniform_plan(
    prepared: Prepared,
    study: Study,
    methods: Mapping[str, Method],
    menu: Menu,
    allocator: Uniform,
    name: str,
) -> tuple[str, Allocation]:
    """`first_feasible` with one method of one size everywhere, and the entries or bases that it chooses."""

    def spend(part: Menu) -> Allocation:
        plan = allocator.allocate(part, prepared.budget)
        return attach_indices(plan, {**study.methods, **methods}, prepared.scores_for(study), part.sites)

    return first_feasible(prepared, name, menu, spend)
