"""Trainable parameters as a goal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from autopeft.core.outcome import Outcome, Split
from autopeft.errors import UsageError

if TYPE_CHECKING:
    from torch import nn

    from autopeft.core.contracts import Task

__all__ = ["Parameters"]


@dataclass(frozen=True, slots=True)
class Parameters:
    """How many parameters a plan trains, head not counted; satisfies `autopeft.core.contracts.Reward`.

    A goal beside others, in `joint`: the budget is a limit, this is what a search saves below it.
    """

    @property
    def goals(self) -> tuple[str, ...]:
        """The fewer the better."""
        return ("minimize",)

    @property
    def names(self) -> tuple[str, ...]:
        """`parameters`."""
        return ("parameters",)

    @property
    def watched(self) -> None:
        """Nothing: the count does not change while the model trains."""
        return None

    def measure(self, model: nn.Module, task: Task, split: Split) -> Mapping[str, float]:
        """Nothing: the trainable count is part of every outcome."""
        return {}

    def value(self, outcome: Outcome) -> tuple[float, ...]:
        """The outcome's count.

        Raises:
            UsageError: when the outcome is not done.
        """
        if outcome.status != "done":
            raise UsageError(f"only an outcome that is done has rewards, this one is {outcome.status}")
        return (float(outcome.trainable),)
