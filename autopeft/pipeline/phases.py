"""Trainings in two phases: a first plan for some epochs, then another one in its place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from autopeft.core.allocation import Allocation
from autopeft.core.contracts import Inserted
from autopeft.core.outcome import Split
from autopeft.errors import UsageError
from autopeft.methods.lora import LoRAAdapter
from autopeft.training.checkpoint import Checkpoint
from autopeft.training.handover import Begin, Moments, hand_over
from autopeft.training.loop import fit
from autopeft.training.threads import thread_count

if TYPE_CHECKING:
    from torch import Tensor

    from autopeft.config.study import Study
    from autopeft.pipeline.prepare import Prepared

__all__ = ["FirstPhase", "Trained", "first_checkpoint", "train_first"]


@dataclass(frozen=True)
class FirstPhase:
    """What is trained before the plan itself.

    Attributes:
        allocation: the first plan, under the same budget.
        epochs: its epochs, of the one schedule that both phases share.

    Raises:
        UsageError: when it has no epoch.
    """

    allocation: Allocation
    epochs: int

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise UsageError(f"the first phase needs at least 1 epoch, got {self.epochs}")


@dataclass(frozen=True, eq=False)
class Trained:
    """What the first phase left.

    Attributes:
        first: the phase.
        state: `Inserted.state` after it.
        moments: AdamW's moments after it.
        losses: mean training loss of its epochs.
        scales: option key to LoRA's scale.
        peak_bytes: peak memory on a device.
    """

    first: FirstPhase
    state: Mapping[str, Tensor]
    moments: Moments
    losses: tuple[float, ...]
    scales: Mapping[str, float]
    peak_bytes: int = 0

    def begin(self, inserted: Inserted) -> Begin:
        """Where the second plan, as it was inserted, goes on."""
        first = self.first
        found = hand_over(first.allocation, self.state, self.moments, inserted, first.epochs, scales=self.scales)
        return Begin(found.epoch, found.state, found.moments, self.losses)


def train_first(
    prepared: Prepared,
    study: Study,
    first: FirstPhase,
    *,
    seed: int,
    folder: Path | None,
    splits: tuple[Split, ...],
) -> Trained:
    """Train the first plan for its epochs; a checkpoint in the folder is continued, and kept until it is cleared.

    Raises:
        UsageError: when its epochs are not fewer than those of the schedule.
        TrainingFailed: when it diverges.
    """
    if first.epochs >= study.train.epochs:
        raise UsageError(
            f"the first phase has {first.epochs} epochs of a schedule of {study.train.epochs}; nothing is left to train"
        )
    with (
        thread_count(prepared.threads),
        study.backend.insert(
            prepared.model, prepared.catalog, first.allocation, study.methods, seed=seed, head=prepared.head
        ) as inserted,
    ):
        done = fit(
            inserted,
            prepared.task,
            study.train,
            methods=study.methods,
            seed=seed,
            device=prepared.device,
            splits=splits,
            watch=None,
            checkpoint=first_checkpoint(folder),
            max_epochs=first.epochs,
            regularisers=study.regularisers,
        )
        scales = {
            key: adapter.scale for key, adapter in inserted.named_adapters().items() if isinstance(adapter, LoRAAdapter)
        }
        return Trained(first, inserted.state(), done.moments, done.losses, scales, done.peak_bytes)


def first_checkpoint(folder: Path | None) -> Checkpoint | None:
    """Where the first phase keeps its progress."""
    return Checkpoint(folder / "checkpoint-first") if folder is not None else None
