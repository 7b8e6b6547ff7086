"""Denoising loss on the split as a goal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from autopeft.rewards._measured import Measured
from autopeft.rewards._pick import Direction
from autopeft.rewards._studio import Studio

__all__ = ["DenoisingLoss"]


@dataclass(frozen=True, slots=True)
class DenoisingLoss(Measured):
    """The task's own `denoising_loss` at fixed noise and timesteps: quality without generating anything.

    It is measured after every epoch, so that a search with this goal can stop trials early.
    """

    direction: ClassVar[Direction] = "minimize"

    @property
    def metric(self) -> str:
        """`denoising_loss`."""
        return "denoising_loss"

    @property
    def watched(self) -> str:
        """Itself."""
        return self.metric

    def look(self, studio: Studio) -> Mapping[str, float]:
        """Nothing beyond what the task measures."""
        return {}
