"""One metric as it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from autopeft.core.outcome import Outcome, Split
from autopeft.errors import UsageError
from autopeft.rewards._pick import Direction, check_direction, pick

if TYPE_CHECKING:
    from torch import nn

    from autopeft.core.contracts import Task

__all__ = ["Metric"]


@dataclass(frozen=True, slots=True)
class Metric:
    """A single metric of the task; satisfies `autopeft.core.contracts.Reward`.

    Attributes:
        name: as the task calls it: `top1`, `macro_f1`, `ece`, `nll`, `scaled_nll` for classification.
        direction: `maximize` or `minimize`; the calibration error and the likelihood are minimised.

    Raises:
        UsageError: for an empty name or an unknown direction.
    """

    name: str = "top1"
    direction: Direction = "maximize"

    def __post_init__(self) -> None:
        if not self.name:
            raise UsageError("a reward needs the name of a metric, such as top1; got an empty one")
        check_direction(self.direction)

    @property
    def goals(self) -> tuple[str, ...]:
        """The direction."""
        return (self.direction,)

    @property
    def names(self) -> tuple[str, ...]:
        """The metric's name."""
        return (self.name,)

    def measure(self, model: nn.Module, task: Task, split: Split) -> Mapping[str, float]:
        """Nothing beyond what the task measures."""
        return {}

    def value(self, outcome: Outcome) -> tuple[float, ...]:
        """The metric.

        Raises:
            UnknownKey: when the outcome has no metric of this name, with a guess.
            UsageError: when the outcome is not done.
        """
        return (pick(outcome, self.name),)
