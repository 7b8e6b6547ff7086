"""The linear probe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from autopeft.allocation.head_only import HeadOnly
from autopeft.core.menu import Menu
from autopeft.errors import InfeasibleBudget
from autopeft.pipeline.contenders import Candidate, Group

if TYPE_CHECKING:
    from autopeft.config.study import Study
    from autopeft.pipeline.prepare import Prepared

__all__ = ["Probe"]


@dataclass(frozen=True, slots=True)
class Probe:
    """The classifier alone, trained as in every other plan."""

    title: ClassVar[str] = "head only"
    needs: ClassVar[tuple[str, ...]] = ()

    def group(self, prepared: Prepared, study: Study) -> Group:
        """The empty plan.

        Raises:
            InfeasibleBudget: for a model without a classifier, of which nothing would be trained.
        """
        if not prepared.catalog.head:
            raise InfeasibleBudget("the model has no head, so nothing would be trained")
        plan = HeadOnly().allocate(Menu(()), prepared.budget)
        return Group(self.title, "baseline", (Candidate(self.title, plan),))
