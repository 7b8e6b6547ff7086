"""One plan, trained once, with its price counted four times."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from autopeft.core.allocation import Allocation
from autopeft.core.outcome import Outcome, Split
from autopeft.errors import BudgetMismatch, TrainingFailed
from autopeft.pipeline.phases import FirstPhase, first_checkpoint, train_first
from autopeft.training.checkpoint import Checkpoint, save_adapter, trainable_in_file
from autopeft.training.evaluate import Evaluation, evaluate
from autopeft.training.loop import fit
from autopeft.training.threads import thread_count

if TYPE_CHECKING:
    from autopeft.config.study import Study
    from autopeft.pipeline.prepare import Prepared

__all__ = ["TrialResult", "count_four_times", "run_trial"]


@dataclass(frozen=True)
class TrialResult:
    """What one training left behind.

    Attributes:
        outcome: the outcome; `failed` when training diverged.
        evaluation: the evaluation behind the outcome's metrics, None when it did not finish.
        adapter: the saved adapter, None when it did not finish.
        sample_epochs: samples that training has seen.
    """

    outcome: Outcome
    evaluation: Evaluation | None
    adapter: Path | None
    sample_epochs: int


def count_four_times(allocation: Allocation, found: int, optimised: int, saved: int) -> None:
    """Compare the price of a plan from four independent sources.

    Args:
        allocation: the plan; its options' costs are the first count.
        found: new parameters found in the model after insertion.
        optimised: scalars in the optimizer's groups, head not counted.
        saved: trained scalars in the header of the saved file, head not counted.

    Raises:
        BudgetMismatch: when two of them differ.
    """
    counts = {"options": allocation.trainable, "model": found, "optimizer": optimised, "file": saved}
    if len(set(counts.values())) != 1:
        listed = ", ".join(f"{name} {count:,}" for name, count in counts.items())
        raise BudgetMismatch(f"four counts of one plan disagree: {listed}")


def run_trial(
    prepared: Prepared,
    study: Study,
    allocation: Allocation,
    *,
    seed: int,
    folder: Path | None,
    splits: tuple[Split, ...] = ("inner",),
    measure: Split = "outer",
    watch: Split | None = None,
    max_epochs: int | None = None,
    on_epoch: Callable[[int, float], bool] | None = None,
    first: FirstPhase | None = None,
) -> TrialResult:
    """Train a plan and evaluate it.

    Args:
        prepared: the borrowed model and its task.
        study: methods, training settings and reward.
        allocation: the plan.
        seed: seed of initialisation and order.
        folder: where checkpoint and adapter go; None keeps neither.
        splits: what is trained on.
        measure: what the metrics are measured on, at the end.
        watch: what is evaluated after each epoch for `on_epoch`; None evaluates at the end alone.
        max_epochs: stop after so many epochs of the schedule.
        on_epoch: called with (epoch, search metric); True stops the training as pruned.
        first: what is trained before the plan, in the first epochs of the schedule.

    Returns:
        A result that is done, pruned or failed; failures of training are values, everything else raises.
    """
    start = time.perf_counter()
    checkpoint = Checkpoint(folder / "checkpoint") if folder is not None else None
    # A reward that generates images has no number before the end; it says which of the task's stands for it, if any.
    metric: str | None = getattr(study.reward, "watched", study.reward.names[0])
    trained = None
    if first is not None:
        try:
            trained = train_first(prepared, study, first, seed=seed, folder=folder, splits=splits)
        except TrainingFailed as error:
            seconds = time.perf_counter() - start
            outcome = Outcome("failed", trainable=0, seconds=seconds, seed=seed, reason=f"first phase: {error}")
            return TrialResult(outcome, None, None, 0)
    with (
        thread_count(prepared.threads),
        study.backend.insert(
            prepared.model, prepared.catalog, allocation, study.methods, seed=seed, head=prepared.head
        ) as inserted,
    ):
        found = inserted.trainable_count()
        try:
            result = fit(
                inserted,
                prepared.task,
                study.train,
                methods=study.methods,
                seed=seed,
                device=prepared.device,
                splits=splits,
                watch=watch,
                metric=metric,
                on_epoch=on_epoch,
                checkpoint=checkpoint,
                max_epochs=max_epochs,
                regularisers=study.regularisers,
                begin=trained.begin(inserted) if trained is not None else None,
            )
            evaluation = None
            metrics: dict[str, float] = {}
            if not result.stopped:
                evaluation = evaluate(inserted.model, prepared.task, measure, prepared.device)
                metrics = {**evaluation.metrics, **study.reward.measure(inserted.model, prepared.task, measure)}
        except TrainingFailed as error:
            outcome = Outcome(
                "failed", trainable=found, seconds=time.perf_counter() - start, seed=seed, reason=str(error)
            )
            return TrialResult(outcome, None, None, 0)
        saved = found
        adapter: Path | None = None
        if folder is not None:
            adapter = save_adapter(inserted, folder / "adapter.safetensors")
            saved = trainable_in_file(adapter)
        count_four_times(allocation, found, result.optimised, saved)
        if evaluation is None:
            outcome = Outcome(
                "pruned",
                curve=result.curve,
                trainable=found,
                seconds=time.perf_counter() - start,
                peak_bytes=result.peak_bytes,
                seed=seed,
                reason=f"stopped after {result.epochs} epochs",
            )
            return TrialResult(outcome, None, adapter, result.sample_epochs)
        outcome = Outcome(
            "done",
            metrics=metrics,
            curve=result.curve,
            trainable=found,
            seconds=time.perf_counter() - start,
            peak_bytes=result.peak_bytes,
            seed=seed,
            split=measure,
        )
        for kept in (checkpoint, first_checkpoint(folder)):
            if kept is not None:
                kept.clear()
        return TrialResult(outcome, evaluation, adapter, result.sample_epochs)
