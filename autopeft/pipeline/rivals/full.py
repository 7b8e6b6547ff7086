"""Full fine-tuning: the ceiling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from autopeft.core.allocation import Allocation, Provenance
from autopeft.core.budget import Budget
from autopeft.core.menu import Option
from autopeft.core.places import places_of
from autopeft.methods.full import Full
from autopeft.pipeline.contenders import Candidate, Group

if TYPE_CHECKING:
    from autopeft.config.study import Study
    from autopeft.pipeline.prepare import Prepared

__all__ = ["FullTuning"]


@dataclass(frozen=True, slots=True)
class FullTuning:
    """Every parameter of every site, whatever the budget: how much could be gained at all."""

    title: ClassVar[str] = "full fine-tuning"
    needs: ClassVar[tuple[str, ...]] = ()

    def group(self, prepared: Prepared, study: Study) -> Group:
        """One plan under a budget of its own."""
        method, catalog = Full(), prepared.catalog
        options = tuple(
            Option(site.name, "full", 1, method.cost(site, 1), 0.0, places)
            for site in catalog.candidates("whole")
            if (places := places_of(catalog, method, site))
        )
        count = sum(option.cost.trainable for option in options)
        plan = Allocation(options, Budget(count, text="everything"), Provenance("full"))
        note = f"not within the budget: {count:,} parameters"
        return Group(
            self.title, "reference", (Candidate(f"{self.title} (ceiling)", plan, {"full": method}),), note=note
        )
