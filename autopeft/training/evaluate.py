"""A model on one split: figures of merit, an interval, and how well each sample is done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from autopeft.core.contracts import Judging, Task
from autopeft.core.outcome import Split
from autopeft.errors import Diverged
from autopeft.tasks.bootstrap import bootstrap_interval
from autopeft.tasks.metrics import classification_metrics
from autopeft.training._device import check_device

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Evaluation", "evaluate"]


@dataclass(frozen=True, slots=True, eq=False)
class Evaluation:
    """What a model does on a split.

    Attributes:
        split: the split.
        metrics: `top1`, `macro_f1`, `ece`, `nll` and `scaled_nll` of a classifier; what the task measures otherwise.
        interval: 95 % bootstrap interval of the first metric, over samples.
        merits: per sample, in file order, for paired tests, (n,): whether it was classified correctly, as bool; how
            well it is done in other tasks, float64, higher is better.
        losses: per sample, in the same order, its negative log-likelihood in nats, float64 of shape (n,); None where
            the task has none.
    """

    split: Split
    metrics: Mapping[str, float]
    interval: tuple[float, float]
    merits: NDArray[np.bool_] | NDArray[np.float64]
    losses: NDArray[np.float64] | None = None

    @property
    def top1(self) -> float:
        """Share of samples classified correctly."""
        return self.metrics["top1"]

    @property
    def macro_f1(self) -> float:
        """Unweighted mean of the classes' F1."""
        return self.metrics["macro_f1"]

    @property
    def ece(self) -> float:
        """Expected calibration error."""
        return self.metrics["ece"]

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood, in nats."""
        return self.metrics["nll"]


def evaluate(model: nn.Module, task: Task, split: Split, device: torch.device | str) -> Evaluation:
    """Evaluate a model on a split, in float32 and without augmentation.

    Args:
        model: the model with its adapters; modes and weights are left as found.
        task: the task.
        split: the split.
        device: where the model lies.

    Raises:
        Diverged: when a logit, or a merit, is NaN or infinite.
        UsageError: when the model lies elsewhere.
        StoreError: for the test split before it is unsealed.
    """
    check_device(model, device)
    if isinstance(task, Judging):
        return _judged(model, task, split)
    logits, labels = task.predict(model, split)
    broken = int((~torch.isfinite(logits).all(dim=1)).sum())
    if broken:
        raise Diverged(
            f"the model gives NaN or infinite logits on {broken} of {len(labels)} samples of the {split} split; "
            "lower the learning rates (train.lr_scale) and train again"
        )
    correct: Any = (logits.argmax(dim=1) == labels).numpy()
    losses = nn.functional.cross_entropy(logits.double(), labels, reduction="none").numpy()
    interval = bootstrap_interval(correct.astype(np.float64))
    return Evaluation(split, classification_metrics(logits, labels), interval, correct, losses)


def _judged(model: nn.Module, task: Judging, split: Split) -> Evaluation:
    metrics, merits = task.judge(model, split)
    values = merits.detach().double().cpu().numpy()
    low, high = bootstrap_interval(values)
    first = next(iter(metrics.values()))
    # Merits are higher where the sample is done better; the interval is of the metric as it is called.
    interval = (low, high) if first * float(values.mean()) >= 0 else (-high, -low)
    return Evaluation(split, dict(metrics), interval, values)
