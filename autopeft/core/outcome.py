"""What came of training one plan once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

__all__ = ["Outcome", "Split", "Status"]

Status = Literal["done", "pruned", "failed"]

Split = Literal["inner", "outer", "test"]
"""`inner` trains, `outer` is what the search sees, `test` is opened once, at the end."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Result of one training.

    Attributes:
        status: whether it ran to its end.
        metrics: name to value, on the split named by `split`.
        curve: (epoch, value of the search metric) pairs, epochs from 1.
        trainable: trainable scalars found in the model, head not counted.
        seconds: wall time.
        peak_bytes: peak memory of the device, 0 when not measured.
        seed: seed of initialisation and order.
        split: the split that `metrics` were measured on.
        reason: why it failed or was pruned.
    """

    status: Status
    metrics: Mapping[str, float] = field(default_factory=dict)
    curve: tuple[tuple[int, float], ...] = ()
    trainable: int = 0
    seconds: float = 0.0
    peak_bytes: int = 0
    seed: int = 0
    split: Split = "outer"
    reason: str = ""

    SCHEMA: ClassVar[str] = "autopeft.outcome/1"

    def __post_init__(self) -> None:
        if self.status not in get_args(Status):
            raise ValueError(f"status must be one of {', '.join(get_args(Status))}, got {self.status!r}")
        if self.status == "done" and not self.metrics:
            raise ValueError("an outcome that is done needs metrics")
        if self.status == "failed" and not self.reason:
            raise ValueError("an outcome that failed needs a reason")
        bad = [name for name, value in self.metrics.items() if not math.isfinite(value)]
        if bad:
            raise ValueError(f"metrics must be finite, not so: {', '.join(sorted(bad))}")
        if self.trainable < 0:
            raise ValueError(f"trainable must be at least 0, got {self.trainable}")
