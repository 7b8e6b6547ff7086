"""Trains plans through the ledger, so that each is trained once."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from autopeft.core.allocation import Allocation
from autopeft.core.outcome import Outcome, Split
from autopeft.pipeline.costs import FORWARD, HEAD_ONLY
from autopeft.pipeline.events import Emit, Event
from autopeft.pipeline.ledger import Entry, Ledger, training_key
from autopeft.pipeline.phases import FirstPhase, first_checkpoint
from autopeft.pipeline.trial import TrialResult, run_trial
from autopeft.search.race import shard_means

if TYPE_CHECKING:
    from autopeft.config.study import Study
    from autopeft.pipeline.prepare import Prepared

__all__ = ["Runner"]


class Runner:
    """A prepared model with a ledger.

    Args:
        prepared: the model and the task.
        ledger: finished trainings.
        emit: what is told after each training.
    """

    def __init__(self, prepared: Prepared, ledger: Ledger, emit: Emit) -> None:
        self.prepared = prepared
        self.ledger = ledger
        self.emit = emit

    def key(
        self,
        study: Study,
        allocation: Allocation,
        seed: int,
        splits: tuple[Split, ...],
        measure: Split,
        epochs: int,
        first: FirstPhase | None = None,
    ) -> str:
        """The key of a training: equal keys give equal results on one device and thread count."""
        prepared = self.prepared
        used = {o.method for plan in (allocation, first.allocation if first else ()) for o in plan}
        return training_key(
            {
                "allocation": allocation.digest,
                **({"first": [first.allocation.digest, first.epochs]} if first is not None else {}),
                "methods": {key: repr(method) for key, method in study.methods.items() if key in used},
                "backend": repr(study.backend),
                "train": repr(study.train),
                **({"regularisers": repr(dict(study.regularisers))} if study.regularisers else {}),
                "task": repr(study.task),
                "reward": repr(study.reward),
                "weights": prepared.loaded.weights_hash,
                "head": prepared.origin.head,
                "data": prepared.task.data_hash,
                "seed": seed,
                "splits": list(splits),
                "measure": measure,
                "epochs": epochs,
                "device": prepared.device.type,
                "threads": prepared.threads,
            }
        )

    def train(
        self,
        study: Study,
        allocation: Allocation,
        *,
        label: str,
        seed: int | None = None,
        splits: tuple[Split, ...] = ("inner",),
        measure: Split = "outer",
        folder: Path | None = None,
        watch: Split | None = None,
        on_epoch: Callable[[int, float], bool] | None = None,
        first: FirstPhase | None = None,
        stage: str = "search",
    ) -> Entry:
        """Train a plan, or return what an equal training gave.

        Args:
            study: settings of the training.
            allocation: the plan.
            label: what a person calls it.
            seed: the study's when None.
            splits: what is trained on.
            measure: what is measured on.
            folder: where the adapter goes; an entry without its adapter is trained again.
            watch: split evaluated after each epoch for `on_epoch`.
            on_epoch: called with (epoch, metric); True prunes.
            first: what is trained before the plan.
            stage: what it is for, in the ledger; a training that failed counts as `failed` where it was of ours.
        """
        seed = study.seed if seed is None else seed
        key = self.key(study, allocation, seed, splits, measure, study.train.epochs, first)
        entry = self.ledger.get(key)
        if entry is not None and (folder is None or (folder / "adapter.safetensors").exists()):
            self._say(label, entry.outcome, study, again=True)
            return entry
        result = run_trial(
            self.prepared,
            study,
            allocation,
            seed=seed,
            folder=folder,
            splits=splits,
            measure=measure,
            watch=watch,
            on_epoch=on_epoch,
            first=first,
        )
        merits = result.evaluation.merits if result.evaluation is not None else np.zeros(0, dtype=bool)
        losses = result.evaluation.losses if result.evaluation is not None else None
        ours = stage in ("default", "race", "search")
        entry = Entry(
            result.outcome,
            merits,
            result.sample_epochs,
            key,
            () if losses is None else shard_means(losses),
            "failed" if ours and result.outcome.status == "failed" else stage,
            self._passes(study, allocation, result, splits, measure, watched=watch is not None),
        )
        if result.outcome.status == "failed" and folder is not None:
            shutil.rmtree(folder / "checkpoint", ignore_errors=True)
            kept = first_checkpoint(folder)
            if kept is not None:
                kept.clear()
        self.ledger.put(key, entry)
        self._say(label, entry.outcome, study)
        return entry

    def rank(self, study: Study, outcome: Outcome) -> tuple[float, float, float]:
        """What candidates are ordered by, the largest first.

        Keeping to the limits, then the first goal and the negative log-likelihood; where the study chooses by
        likelihood, that one and then the goal.
        """
        if outcome.status != "done":
            return (float("-inf"), float("-inf"), float("-inf"))
        kept, goal = study.goals.merit(study.reward.value(outcome))
        nll = outcome.metrics.get("nll", 0.0)
        if study.chosen_by != study.reward.names[0]:
            return (kept, -outcome.metrics.get(study.chosen_by, nll), goal)
        return (kept, goal, -nll)

    def _passes(
        self,
        study: Study,
        allocation: Allocation,
        result: TrialResult,
        splits: tuple[Split, ...],
        measure: Split,
        *,
        watched: bool,
    ) -> float:
        """What a training cost. One that failed is charged in full: it is not known how far it came."""
        sizes, outcome = self.prepared.task.sizes, result.outcome
        samples = float(result.sample_epochs)
        if outcome.status == "failed":
            samples = study.train.epochs * study.train.data_fraction * sum(sizes[split] for split in splits)
        evaluations = (len(outcome.curve) if watched else 0) + (outcome.status != "pruned")
        weight = 1.0 if len(allocation) else HEAD_ONLY
        return weight * samples + FORWARD * evaluations * sizes[measure]

    def _say(self, label: str, outcome: Outcome, study: Study, again: bool = False) -> None:
        if outcome.status == "done":
            name, value = study.reward.names[0], study.reward.value(outcome)[0]
            text = f"{label}: {outcome.split} {name} {value:.4f}"
        else:
            text = f"{label}: {outcome.status} ({outcome.reason})"
        how = "known" if again else f"{outcome.seconds:.1f} s"
        self.emit(Event("result", f"{text}  [{outcome.trainable:,} parameters, {how}]", data={"label": label}))
