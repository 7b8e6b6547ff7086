"""The plan that buys nothing: only the classifier is trained."""

from __future__ import annotations

from dataclasses import dataclass

from autopeft.core.allocation import Allocation, Provenance
from autopeft.core.budget import Budget
from autopeft.core.menu import Menu

__all__ = ["HeadOnly"]


@dataclass(frozen=True, slots=True)
class HeadOnly:
    """The empty allocation: the baseline that every other plan has to beat."""

    def allocate(self, menu: Menu, budget: Budget, seed: int = 0) -> Allocation:
        """The empty plan, whatever the menu, the budget and the seed."""
        return Allocation((), budget, Provenance("head_only"))
