"""What everything costs, whatever the budget."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autopeft.core.menu import Menu, Option
from autopeft.core.places import places_of

if TYPE_CHECKING:
    from autopeft.config.study import Study
    from autopeft.pipeline.prepare import Prepared

__all__ = ["every_option"]


def every_option(prepared: Prepared, study: Study) -> Menu:
    """Every size of every method at every site, also those that cost more than the budget; without predicted gains."""
    sites = {site.name: site for site in prepared.catalog.offered(study.fused)}
    options = [
        Option(site.name, key, size, method.cost(site, size), 0.0, places)
        for site in sites.values()
        for key, method in study.methods.items()
        if (places := places_of(prepared.catalog, method, site)) and (method.mergeable(site) or not study.mergeable)
        for size in method.sizes(site)
    ]
    return Menu(tuple(options), sites)
