"""A metric with a price on trainable parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from autopeft.core.outcome import Outcome, Split
from autopeft.errors import UsageError
from autopeft.rewards._pick import Direction, check_direction, pick

if TYPE_CHECKING:
    from torch import nn

    from autopeft.core.contracts import Task

__all__ = ["MetricWithCost"]


@dataclass(frozen=True, slots=True)
class MetricWithCost:
    """A metric that must pay for its parameters; satisfies `autopeft.core.contracts.Reward`.

    The value is `metric - weight * trainable / per` when the metric is maximised, and `metric + ...` when it is
    minimised: a plan that spends less than the budget wins as soon as the rest would not earn its price.

    Attributes:
        name: as the task calls the metric.
        direction: `maximize` or `minimize`.
        weight: how much of the metric `per` trainable parameters must earn; at least 0.
        per: trainable parameters, head not counted, that `weight` is the price of; at least 1.

    Raises:
        UsageError: for values outside of these ranges.
    """

    name: str = "top1"
    direction: Direction = "maximize"
    weight: float = 0.01
    per: int = 10_000

    def __post_init__(self) -> None:
        if not self.name:
            raise UsageError("a reward needs the name of a metric, such as top1; got an empty one")
        check_direction(self.direction)
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise UsageError(f"the weight of a cost must be finite and at least 0, got {self.weight}")
        if self.per < 1:
            raise UsageError(f"per counts trainable parameters and must be at least 1, got {self.per}")

    @property
    def goals(self) -> tuple[str, ...]:
        """The direction."""
        return (self.direction,)

    @property
    def names(self) -> tuple[str, ...]:
        """The metric's name, which is what is watched while training: a plan's price does not change then."""
        return (self.name,)

    def measure(self, model: nn.Module, task: Task, split: Split) -> Mapping[str, float]:
        """Nothing: the trainable count is part of every outcome."""
        return {}

    def value(self, outcome: Outcome) -> tuple[float, ...]:
        """The metric less its price.

        Raises:
            UnknownKey: when the outcome has no metric of this name, with a guess.
            UsageError: when the outcome is not done.
        """
        price = self.weight * outcome.trainable / self.per
        metric = pick(outcome, self.name)
        return (metric - price if self.direction == "maximize" else metric + price,)
