"""What every term has in common."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from autopeft.core.contracts import StepState
from autopeft.errors import UsageError

__all__ = ["BaseTerm", "check_weight"]


class BaseTerm:
    """A term that adds nothing, leaves the gradients alone and keeps nothing; also what a weight of 0 begins.

    A subclass overrides what it does.
    """

    def add(self, state: StepState) -> Tensor | None:
        """Nothing."""
        return None

    def adjust(self, state: StepState) -> None:
        """Nothing."""

    def state(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Nothing to take up.

        Raises:
            UsageError: when there is something.
        """
        if state:
            raise UsageError(f"{type(self).__name__} keeps no tensors, the checkpoint has {', '.join(sorted(state))}")


def check_weight(name: str, weight: float) -> None:
    """Refuse a weight that is negative or no number."""
    if not (math.isfinite(weight) and weight >= 0):
        raise UsageError(f"{name}: weight must be a number of at least 0 (0 switches it off), got {weight!r}")
