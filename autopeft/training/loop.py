"""The inner loop: one plan, trained on some splits, watched on another."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sized
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from autopeft.core.contracts import Inserted, Method, Regulariser, Task
from autopeft.core.outcome import Split
from autopeft.errors import Diverged, UsageError
from autopeft.training import preempt
from autopeft.training._device import check_device
from autopeft.training._terms import Terms
from autopeft.training.checkpoint import Checkpoint, Progress
from autopeft.training.handover import Begin, Moments, named_parameters
from autopeft.training.identity import training_identity
from autopeft.training.liveness import Liveness
from autopeft.training.optim import make_optimizer, optimised_count, schedule_factor, set_rates
from autopeft.training.seeds import derive_seed, isolated_rng, seed_all
from autopeft.training.settings import TrainSettings
from autopeft.training.threads import thread_count
from autopeft.training.watchdog import Watchdog

__all__ = ["Fit", "OnEpoch", "fit"]

_LOOK_EVERY = 16
"""Steps between two looks at the losses on an accelerator: each look waits for the device."""

_HINT = "lower them with train.lr_scale (a third is a good next try), or clip harder with train.clip"

OnEpoch = Callable[[int, float], bool]


@dataclass(frozen=True, slots=True)
class Fit:
    """What a training did.

    Attributes:
        curve: (epoch, value of the watched metric) pairs, epochs from 1; empty when nothing was watched.
        metrics: all metrics of the watched split after the last epoch.
        losses: mean training loss of each epoch.
        epochs: complete epochs.
        steps: optimizer steps.
        sample_epochs: samples seen, each as often as it was seen.
        optimised: trainable scalars in the optimizer's groups, head not counted.
        seconds: wall time, interrupted stretches included.
        peak_bytes: peak memory allocated on a CUDA device, 0 elsewhere.
        threads: torch threads it ran with.
        stopped: whether `on_epoch` ended it.
        moments: AdamW's moments by the parameters' names, where `max_epochs` ended it before its schedule.
    """

    curve: tuple[tuple[int, float], ...]
    metrics: Mapping[str, float]
    losses: tuple[float, ...]
    epochs: int
    steps: int
    sample_epochs: int
    optimised: int
    seconds: float
    peak_bytes: int
    threads: int
    stopped: bool
    moments: Moments = field(default_factory=dict, compare=False, repr=False)


def fit(
    inserted: Inserted,
    task: Task,
    settings: TrainSettings,
    *,
    methods: Mapping[str, Method],
    seed: int,
    device: torch.device | str,
    splits: tuple[Split, ...] = ("inner",),
    watch: Split | None = "outer",
    metric: str | None = "top1",
    on_epoch: OnEpoch | None = None,
    checkpoint: Checkpoint | None = None,
    max_epochs: int | None = None,
    regularisers: Mapping[str, Regulariser] | None = None,
    begin: Begin | None = None,
) -> Fit:
    """Train the adapters and the head of a model.

    Every epoch starts from its own seed, so that a training stopped at a rung or by a signal and continued from its
    checkpoint gives the same weights, bit for bit, as one that was never stopped.

    Args:
        inserted: the model with adapters, on its device.
        task: the data and the loss.
        settings: the schedule, which is over all `settings.epochs`.
        methods: method key to method, for the learning rates.
        seed: seed of the order, the augmentation and the model's own noise (dropout).
        device: where the model lies.
        splits: what is trained on; several only with a task that has `batches_of`.
        watch: what is evaluated after each epoch; None evaluates nothing.
        metric: the metric of the curve; None takes the first that the task measures.
        on_epoch: called after each epoch, epochs from 1, with the metric; True ends the training. Epochs that an
            earlier process has done are passed to it again.
        checkpoint: where progress is kept, and where training continues from.
        max_epochs: stop after so many epochs.
        regularisers: name to regulariser: terms added to the loss, and changes of the gradients.
        begin: where to begin when there is no checkpoint: behind another plan's first epochs.

    Raises:
        Diverged: when a loss, a gradient or a metric is NaN or infinite.
        DeadAdapter: when an adapter receives no gradient.
        BudgetMismatch: when the optimizer does not hold as many scalars as the plan costs.
        Preempted: when a signal asked to stop; the checkpoint is saved.
        UsageError: for arguments that do not fit together.
    """
    if max_epochs is not None and max_epochs < 1:
        raise UsageError(f"max_epochs must be at least 1, got {max_epochs}")
    if on_epoch is not None and watch is None:
        raise UsageError("on_epoch is called with a metric of the watched split; name one with `watch`")
    where = check_device(inserted.model, device)
    threads = thread_count(settings.threads) if settings.threads is not None else contextlib.nullcontext()
    with isolated_rng(derive_seed(seed, "fit")), threads:
        shaping = dict(regularisers or {})
        run = _Run(
            inserted, task, settings, methods, seed, where, splits, watch, metric, on_epoch, checkpoint, shaping, begin
        )
        try:
            return run.train(min(settings.epochs, max_epochs or settings.epochs))
        finally:
            run.optimizer.zero_grad(set_to_none=True)
            inserted.train_mode(False)


@runtime_checkable
class _Joining(Protocol):
    """A task that can walk several splits as one."""

    def batches_of(self, splits: tuple[Split, ...], seed: int | None = None) -> Iterable[Any]: ...


@dataclass
class _Run:
    """One call of `fit`."""

    inserted: Inserted
    task: Task
    settings: TrainSettings
    methods: Mapping[str, Method]
    seed: int
    device: torch.device
    splits: tuple[Split, ...]
    watch: Split | None
    metric: str | None
    on_epoch: OnEpoch | None
    checkpoint: Checkpoint | None
    regularisers: Mapping[str, Regulariser]
    begin: Begin | None

    optimizer: torch.optim.AdamW = field(init=False)
    progress: Progress = field(init=False)

    def __post_init__(self) -> None:
        self.inserted.prepare(self.task, derive_seed(self.seed, "prepare"))
        self.optimizer = make_optimizer(self.inserted, self.settings, self.methods)
        self._parameters: list[nn.Parameter] = [p for g in self.optimizer.param_groups for p in g["params"]]
        self._liveness = Liveness(self.inserted.named_adapters())
        length = _length(self._batches(0))
        if not length:
            raise UsageError(f"there is nothing to train on: {' + '.join(self.splits)} has no batch")
        self._steps_per_epoch = math.ceil(self.settings.data_fraction * length)
        samples = sum(self.task.sizes[split] for split in self.splits)
        self._samples_per_epoch = math.ceil(samples * self._steps_per_epoch / length)
        self._begun = time.perf_counter()
        self._saved_at = self._begun
        facts = {
            "seed": self.seed,
            "splits": list(self.splits),
            "watch": self.watch,
            "metric": self.metric,
            "device": self.device.type,
        }
        if self.regularisers:
            facts["regularisers"] = {name: repr(found) for name, found in sorted(self.regularisers.items())}
        if self.begin is not None:
            facts["begin"] = self.begin.digest
        self.progress = Progress(training_identity(self.inserted, self.task, self.settings, self.methods, facts), 0)
        self._rng: dict[str, Tensor] = {}
        self._terms = Terms(self.inserted, self.task, self.regularisers, self.seed)

    def train(self, last: int) -> Fit:
        """Train up to epoch `last`."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        stopped = self._resume()
        while not stopped and self.progress.epoch < last:
            self._epoch()
            stopped = self._tell()
            self._save_if_due(force=self.progress.epoch == last < self.settings.epochs)
        done = self.progress
        short = not stopped and done.epoch < self.settings.epochs
        return Fit(
            curve=done.curve,
            metrics=dict(done.metrics),
            losses=done.losses,
            epochs=done.epoch,
            steps=done.epoch * self._steps_per_epoch,
            sample_epochs=done.epoch * self._samples_per_epoch,
            optimised=optimised_count(self.optimizer),
            seconds=self._seconds(),
            peak_bytes=torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0,
            threads=torch.get_num_threads(),
            stopped=stopped,
            moments=self._moments() if short else {},
        )

    def _epoch(self) -> None:
        """Train one epoch, or the rest of one, and evaluate after it."""
        epoch, first = self.progress.epoch, self.progress.step
        self.inserted.train_mode(True)
        seed_all(derive_seed(self.seed, "noise", epoch))
        watchdog = Watchdog(1 if self.device.type == "cpu" else _LOOK_EVERY, self._describe, self.progress.loss_sum)
        total = self.settings.epochs * self._steps_per_epoch
        for index, batch in enumerate(islice(self._batches(epoch), self._steps_per_epoch)):
            if index < first:
                continue
            if index == first and first:
                self._set_rng()
            if preempt.requested():
                self._save_within(index, watchdog)
            step = epoch * self._steps_per_epoch + index
            set_rates(self.optimizer, schedule_factor(step, total, self.settings.warmup_fraction))
            for parameter in self.inserted.advance(step, total):
                self.optimizer.state.pop(parameter, None)
            watchdog.note(step, *self._step(batch, step, total))
        mean = watchdog.look() / self._steps_per_epoch
        if not self._liveness.done:
            self._liveness.at_epoch_end()
        self.inserted.train_mode(False)
        curve, metrics = self.progress.curve, self.progress.metrics
        if self.watch is not None:
            metrics = self._evaluate(self.watch, epoch)
            curve = (*curve, (epoch + 1, metrics[self.metric or next(iter(metrics))]))
        losses = (*self.progress.losses, mean)
        self.progress = replace(
            self.progress, epoch=epoch + 1, step=0, loss_sum=0.0, losses=losses, curve=curve, metrics=metrics
        )

    def _step(self, batch: Any, step: int, total: int) -> tuple[Tensor, Tensor]:
        """One step; returns loss and gradient norm, unread, so that the device is not waited for."""
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.amp == "bf16"):
            with self._terms.watching(batch, step, total):
                loss = self.task.loss(self.inserted.model, batch)
            loss = self._terms.added_to(loss)
        loss.backward()  # type: ignore[no-untyped-call]  # torch annotates it only in part
        self._terms.adjust()
        if not self._liveness.done:
            self._liveness.after_backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        if self.settings.clip:
            torch.nn.utils.clip_grads_with_norm_(self._parameters, self.settings.clip, norm)
        self.optimizer.step()
        return loss.detach(), norm

    def _evaluate(self, split: Split, epoch: int) -> dict[str, float]:
        metrics = dict(self.task.evaluate(self.inserted.model, split))
        if self.metric is not None and self.metric not in metrics:
            raise UsageError(f"the task has no metric {self.metric!r}; it has {', '.join(sorted(metrics))}")
        broken = [name for name, value in metrics.items() if not math.isfinite(value)]
        if broken:
            raise Diverged(f"{broken[0]} of the {split} split is {metrics[broken[0]]} after epoch {epoch + 1}; {_HINT}")
        return metrics

    def _tell(self) -> bool:
        if self.on_epoch is None:
            return False
        return self.on_epoch(*self.progress.curve[-1])

    def _batches(self, epoch: int) -> Iterable[Any]:
        seed = derive_seed(self.seed, "order", epoch)
        if len(self.splits) == 1:
            return self.task.batches(self.splits[0], seed)
        if not isinstance(self.task, _Joining):
            raise UsageError(
                f"cannot train on {' + '.join(self.splits)} together: {type(self.task).__name__} has no batches_of"
            )
        return self.task.batches_of(self.splits, seed)

    def _describe(self, step: int, what: str, value: float) -> str:
        epoch = step // self._steps_per_epoch + 1
        rates: dict[str, set[float]] = {}
        for group in self.optimizer.param_groups:
            rates.setdefault(group["key"], set()).add(group["peak"])
        listed = ", ".join(
            f"{key} {' to '.join(f'{r:g}' for r in sorted({min(v), max(v)}))}" for key, v in rates.items()
        )
        return (
            f"the {what} became {value} at step {step + 1} (epoch {epoch} of {self.settings.epochs}) with the learning "
            f"rates {listed}; {_HINT}"
        )

    def _resume(self) -> bool:
        """Continue from the checkpoint; whether `on_epoch` ends it at an epoch that was done before."""
        resumed = self.checkpoint.load(self.progress.identity) if self.checkpoint is not None else None
        if resumed is None:
            return self.begin is not None and self._go_on_from(self.begin)
        self.inserted.load_state(resumed.state)
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": resumed.optimizer, "param_groups": groups})
        self.progress, self._rng = resumed.progress, resumed.rng
        self._terms.load_state(resumed.terms)
        return self.on_epoch is not None and any(self.on_epoch(*point) for point in resumed.progress.curve)

    def _go_on_from(self, begin: Begin) -> bool:
        """Take up where another plan's training ended; as `_resume`."""
        self.inserted.load_state(begin.state)
        for name, parameter in named_parameters(self.inserted).items():
            if name in begin.moments:
                kept = begin.moments[name]
                self.optimizer.state[parameter] = {
                    key: t.clone() if key == "step" else t.to(parameter, copy=True) for key, t in kept.items()
                }
        self.progress = replace(self.progress, epoch=begin.epoch, losses=begin.losses, curve=begin.curve)
        return self.on_epoch is not None and any(self.on_epoch(*point) for point in begin.curve)

    def _moments(self) -> dict[str, dict[str, Tensor]]:
        """Copies on the CPU."""
        state = self.optimizer.state
        return {
            name: {key: t.detach().to("cpu", copy=True) for key, t in state[parameter].items()}
            for name, parameter in named_parameters(self.inserted).items()
            if parameter in state
        }

    def _save_if_due(self, force: bool) -> None:
        if self.checkpoint is not None:
            due = time.perf_counter() - self._saved_at >= self.checkpoint.every_seconds
            if force or due:
                self._save(self.progress)

    def _save(self, progress: Progress) -> None:
        if self.checkpoint is not None:
            progress = replace(progress, seconds=self._seconds())
            self.checkpoint.save(progress, self.inserted, self.optimizer, self._get_rng(), self._terms.state())
            self._saved_at = time.perf_counter()

    def _save_within(self, index: int, watchdog: Watchdog) -> None:
        """Save before step `index` of the current epoch, and stop."""
        self._save(replace(self.progress, step=index, loss_sum=watchdog.look()))
        preempt.stop_if_requested(
            "the training is saved" if self.checkpoint is not None else "the training keeps no checkpoint"
        )

    def _seconds(self) -> float:
        return self.progress.seconds + time.perf_counter() - self._begun

    def _get_rng(self) -> dict[str, Tensor]:
        state = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def _set_rng(self) -> None:
        torch.set_rng_state(self._rng["cpu"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(self._rng["cuda"], self.device)


def _length(batches: Iterable[Any]) -> int:
    """Number of batches of an epoch; a task whose batches have no length is walked once."""
    return len(batches) if isinstance(batches, Sized) else sum(1 for _ in batches)
