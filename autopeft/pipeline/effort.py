"""How long to train: as asked, or as long as a time limit allows at the measured speed."""

from __future__ import annotations

import dataclasses
import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from autopeft.core.allocation import Allocation
from autopeft.training.threads import thread_count

if TYPE_CHECKING:
    from autopeft.config.study import Study, Tier
    from autopeft.pipeline.contenders import Group
    from autopeft.pipeline.prepare import Prepared

__all__ = ["Effort", "finish_seconds", "measure_speed", "plan_effort"]

_CONTENDERS = 3
"""The winner and the two best baselines are retrained at the end."""

_RESERVE = 0.8
"""Share of the time limit that training may be planned for; the rest is evaluation, export and report."""

_TRIAL_SHARE = 0.6
"""Share of the full schedule that an average trial runs for before it is pruned."""

_MIN_EPOCHS = 2

_LARGE = 10_000
_SMALLEST_SHARE = 0.1
_PER_CLASS = 50


@dataclass(frozen=True, slots=True)
class Effort:
    """How long trainings are.

    Attributes:
        epochs: full fidelity: a trial that is not pruned, a tuned contender, a training at the end. Counted in epochs
            of `fraction` of the data.
        rung: epochs of the short runs that choose a learning rate and a variant.
        fraction: share of the inner split that one epoch visits: 1 for small data, so that rungs are whole epochs.
        tries: learning rates per contender, where the time limit leaves no room for the study's number; else None.
        seconds_per_sample: measured time of one training step per sample, 0 when not measured.
        planned_seconds: predicted time of all trainings, 0 when not measured.
    """

    epochs: int
    rung: int
    fraction: float = 1.0
    tries: int | None = None
    seconds_per_sample: float = 0.0
    planned_seconds: float = 0.0

    @classmethod
    def of(cls, epochs: int, inner: int, classes: int) -> Effort:
        """The effort of a number of passes over the data; the short runs are a third of it, at least one epoch.

        From 10,000 inner samples on, epochs visit a share of them, at least a tenth and 50 per class: the first rungs
        are then fractions of the data, and the short runs a ninth.

        Args:
            epochs: passes over the inner split.
            inner: its samples.
            classes: number of classes.
        """
        if inner < _LARGE:
            return cls(epochs, max(1, epochs // 3))
        parts = max(1, math.floor(1 / max(_SMALLEST_SHARE, _PER_CLASS * classes / inner)))
        return cls(epochs * parts, max(1, epochs * parts // 9), 1 / parts)

    def of_trials(self, tier: Tier | None) -> Effort:
        """How long our own candidates train while they are compared.

        In the tier `search` as long as the short runs: at full length it would buy two or three trials, which choose
        nothing. The winner is trained in full at the end.
        """
        return dataclasses.replace(self, epochs=self.rung) if tier == "search" else self


def plan_effort(prepared: Prepared, study: Study, groups: tuple[Group, ...], spent_seconds: float) -> Effort:
    """The largest number of epochs, up to the study's, whose trainings fit the time limit; at least 2.

    Where not even 2 fit, every contender is trained with one learning rate alone.

    Args:
        prepared: the model and the task.
        study: its `train.epochs` is the most that is tried, its `search.time_limit` the seconds in all.
        groups: the contenders.
        spent_seconds: seconds gone already.
    """
    limit = study.search.time_limit
    inner, classes = prepared.task.sizes["inner"], len(prepared.task.classes)
    if limit is None:
        return Effort.of(study.train.epochs, inner, classes)
    speed = measure_speed(prepared, study, groups[-1].candidates[0].allocation)
    available = max(0.0, limit - spent_seconds) * _RESERVE
    for epochs in range(study.train.epochs, _MIN_EPOCHS, -1):
        effort = Effort.of(epochs, inner, classes)
        planned = _samples(prepared, study, groups, effort) * speed
        if planned <= available:
            break
    else:
        effort = Effort.of(min(_MIN_EPOCHS, study.train.epochs), inner, classes)
        if _samples(prepared, study, groups, effort) * speed > available:
            effort = dataclasses.replace(effort, tries=1)
        planned = _samples(prepared, study, groups, effort) * speed
    return dataclasses.replace(effort, seconds_per_sample=speed, planned_seconds=planned)


def finish_seconds(prepared: Prepared, study: Study, effort: Effort) -> float:
    """Predicted time of the trainings at the end."""
    both = prepared.task.sizes["inner"] + prepared.task.sizes["outer"]
    return _CONTENDERS * study.search.seeds * effort.epochs * effort.fraction * both * effort.seconds_per_sample


def measure_speed(prepared: Prepared, study: Study, allocation: Allocation, steps: int = 4) -> float:
    """Seconds per sample of a training step with this plan: the median of a few steps after one warm-up."""
    model = prepared.model
    with (
        thread_count(prepared.threads),
        study.backend.insert(model, prepared.catalog, allocation, study.methods, head=prepared.head) as inserted,
    ):
        inserted.train_mode(True)
        times = []
        for step, batch in enumerate(prepared.task.batches("inner", seed=0)):
            start = time.perf_counter()
            prepared.task.loss(inserted.model, batch).backward()  # type: ignore[no-untyped-call]
            if prepared.device.type == "cuda":
                # The device works on after the call returns.
                torch.cuda.synchronize(prepared.device)
            times.append((time.perf_counter() - start) / len(batch[0]))
            if step == steps:
                break
    counted = sorted(times[1:] or times)
    return counted[len(counted) // 2]


def _samples(prepared: Prepared, study: Study, groups: tuple[Group, ...], effort: Effort) -> float:
    inner, outer = prepared.task.sizes["inner"], prepared.task.sizes["outer"]
    runs = 0.0
    for group in groups:
        if not len(group.candidates[0].allocation):
            # A plan without adapters has no learning rate to tune, and no backward pass through the model.
            runs += 0.5 * effort.epochs
            continue
        tries = effort.tries or study.search.tries
        variants = len(group.candidates) * tries
        runs += (variants * effort.rung if variants > 1 else 0) + (effort.epochs if tries == 1 else 2 * effort.epochs)
    search = (runs + study.search.trials * effort.epochs * _TRIAL_SHARE) * inner
    return effort.fraction * (search + _CONTENDERS * study.search.seeds * effort.epochs * (inner + outer))
