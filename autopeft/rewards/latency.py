"""Time of a forward pass as a goal."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from autopeft.errors import UsageError
from autopeft.rewards._measured import Measured
from autopeft.rewards._pick import Direction
from autopeft.rewards._studio import Studio, borrowed

__all__ = ["Latency"]


@dataclass(frozen=True, slots=True)
class Latency(Measured):
    """Milliseconds per sample of the model with its adapters in it, not merged: the median over repetitions.

    The task's own loss on one batch of the split, without gradients, in evaluation mode, after one pass that is not
    timed. It is the one reward that is not repeatable: compare with `latency_spread`, half of the interquartile range.

    Attributes:
        repeats: timed passes.
        batch_size: samples of the batch.
    """

    repeats: int = 9
    batch_size: int = 8

    direction: ClassVar[Direction] = "minimize"

    def __post_init__(self) -> None:
        if self.repeats < 3 or self.batch_size < 1:
            raise UsageError(
                f"latency needs at least 3 repetitions and a batch of at least 1, got {self.repeats} and "
                f"{self.batch_size}"
            )

    @property
    def metric(self) -> str:
        """`latency_ms`."""
        return "latency_ms"

    def look(self, studio: Studio) -> Mapping[str, float]:
        """As the class says."""
        batch = next(iter(studio.task.batches(studio.split, batch_size=self.batch_size)))
        device = next((p.device for p in studio.model.parameters()), torch.device("cpu"))
        times = []
        with borrowed(studio.model):
            for _ in range(self.repeats + 1):
                started = time.perf_counter()
                n = len(studio.task.losses(studio.model, batch))
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                times.append(1000 * (time.perf_counter() - started) / n)
        low, middle, high = statistics.quantiles(times[1:], n=4)
        return {"latency_ms": middle, "latency_spread": (high - low) / 2}
