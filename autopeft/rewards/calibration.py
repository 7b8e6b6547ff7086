"""Calibration error as a goal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from autopeft.errors import UsageError
from autopeft.rewards._measured import Measured
from autopeft.rewards._pick import Direction
from autopeft.rewards._studio import Studio

__all__ = ["Calibration"]


@dataclass(frozen=True, slots=True)
class Calibration(Measured):
    """Expected calibration error over bins of equal counts: `sum |B| / n * |accuracy(B) - confidence(B)|`.

    Nixon et al., 2019, arXiv 1904.01685, section 3 (adaptive calibration error of the predicted class). The task's own
    `ece` has bins of equal width, of which a confident model leaves most empty; `{type: metric, name: ece, direction:
    minimize}` is that one.

    Attributes:
        bins: number of bins, at most one per sample.
    """

    bins: int = 15

    direction: ClassVar[Direction] = "minimize"

    def __post_init__(self) -> None:
        if self.bins < 1:
            raise UsageError(f"the calibration error needs at least 1 bin, got {self.bins}")

    @property
    def metric(self) -> str:
        """`adaptive_ece`."""
        return "adaptive_ece"

    def look(self, studio: Studio) -> Mapping[str, float]:
        """As the class says.

        Raises:
            UsageError: when the task gives no logits with integer labels.
        """
        logits, labels = studio.task.predict(studio.model, studio.split)
        if logits.ndim != 2 or logits.shape[1] < 2 or labels.dtype != torch.int64:
            raise UsageError(f"calibration needs logits (n, classes) of a classifier, got {tuple(logits.shape)}")
        confidence, predicted = logits.double().softmax(dim=1).max(dim=1)
        order = confidence.argsort(stable=True)
        gap = (predicted == labels).double() - confidence
        parts = torch.tensor_split(gap[order], min(self.bins, len(gap)))
        return {"adaptive_ece": float(torch.stack([part.sum().abs() for part in parts]).sum() / len(gap))}
