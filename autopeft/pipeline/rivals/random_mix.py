"""Random feasible mixes of the study's own menu."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from autopeft.allocation.indices import attach_indices
from autopeft.allocation.random import RandomMix
from autopeft.core.allocation import Allocation
from autopeft.core.menu import Menu
from autopeft.pipeline.contenders import Candidate, Group
from autopeft.pipeline.plan import make_menu
from autopeft.pipeline.rivals._plans import variants

if TYPE_CHECKING:
    from autopeft.config.study import Study
    from autopeft.pipeline.prepare import Prepared

__all__ = ["RandomMixes"]

_DRAWS = 5
_HURRIED_DRAWS = 2


@dataclass(frozen=True, slots=True)
class RandomMixes:
    """Five plans drawn at random, of which the best is kept; the report shows their mean and deviation.

    Two where the whole run has a time limit: the minutes of a first look have no room for five.
    """

    title: ClassVar[str] = "random mix"
    needs: ClassVar[tuple[str, ...]] = ()

    def group(self, prepared: Prepared, study: Study) -> Group:
        """One variant per draw, from the study's seed on."""
        menu = make_menu(prepared, study)
        draws = _DRAWS if study.search.time_limit is None else _HURRIED_DRAWS
        plans = variants((f"random mix {i + 1}", partial(_draw, prepared, study, menu, i)) for i in range(draws))
        return Group(self.title, "baseline", tuple(Candidate(name, plan) for name, plan in plans))


def _draw(prepared: Prepared, study: Study, menu: Menu, draw: int) -> Allocation:
    plan = RandomMix().allocate(menu, prepared.budget, study.seed + draw)
    return attach_indices(plan, study.methods, prepared.scores_for(study), menu.sites)
