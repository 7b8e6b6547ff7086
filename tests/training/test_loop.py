from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autopeft.errors import BudgetMismatch, DeadAdapter, Diverged, Preempted, UsageError
from autopeft.testing.toy_task import ToyTask
from autopeft.training.checkpoint import Checkpoint
from autopeft.training.loop import Fit, fit
from autopeft.training.optim import schedule_factor
from autopeft.training.preempt import preemptible
from autopeft.training.seeds import derive_seed
from autopeft.training.settings import LearningRates, TrainSettings

SETTINGS = TrainSettings(epochs=6, lr=LearningRates(head=5e-3, matrix=2e-2), rate_rule="none")
Insert = Callable[..., Any]


def _fit(
    inserted: Any, methods: Mapping[str, Any], task: Any = None, settings: TrainSettings = SETTINGS, **kw: Any
) -> Fit:
    return fit(inserted, task or ToyTask(), settings, **{"methods": methods, "seed": 3, "device": "cpu", **kw})


def _same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_it_learns(insert: Insert, methods: dict[str, Any]) -> None:
    inserted = insert()
    base = {n: p.detach().clone() for n, p in inserted.model.first.named_parameters()}
    result = _fit(inserted, methods)
    assert result.losses[-1] < 0.5 * result.losses[0]
    assert result.curve[-1][1] > result.curve[0][1]
    assert result.curve[-1][1] == result.metrics["top1"] > 0.8
    assert [epoch for epoch, _ in result.curve] == [1, 2, 3, 4, 5, 6]
    assert (result.epochs, result.steps, result.sample_epochs) == (6, 24, 192)
    assert result.optimised == 420
    assert result.threads == 1
    assert result.seconds > 0
    assert result.peak_bytes == 0
    assert not result.stopped
    assert _same(base, dict(inserted.model.first.named_parameters()))
    assert inserted.modes[0]
    assert not inserted.modes[-1]
    assert not inserted.model.training
    assert all(p.grad is None for p in inserted.model.parameters())


def test_equals_a_loop_written_out(insert: Insert, methods: dict[str, Any]) -> None:
    inserted, twin, task = insert(), insert(), ToyTask()
    _fit(inserted, methods, task, watch=None)
    rates = SETTINGS.rates
    moments: dict[str, tuple[Tensor, Tensor]] = {}
    named = {f"a.{n}": p for n, p in twin.adapter.named_parameters()}
    named |= {f"h.{n}": p for n, p in twin.model.head.named_parameters()}
    for step in range(24):
        epoch, index = divmod(step, 4)
        images, labels = list(task.batches("inner", derive_seed(3, "order", epoch)))[index]
        grads = torch.autograd.grad(F.cross_entropy(twin.model(images), labels), list(named.values()))
        norm = torch.stack([g.norm() for g in grads]).norm()
        scale = min(1.0, 1.0 / (norm.item() + 1e-6))
        for (name, p), g in zip(named.items(), grads, strict=True):
            g = g * scale
            m, v = moments.get(name, (torch.zeros_like(p), torch.zeros_like(p)))
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            moments[name] = (m, v)
            lr = (rates.head if name[0] == "h" else rates.matrix) * schedule_factor(step, 24, 0.1)
            decay = SETTINGS.weight_decay if p.ndim >= 2 else 0.0
            with torch.no_grad():
                p.mul_(1 - lr * decay)
                p.sub_(lr * (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8))
    for name, tensor in inserted.state().items():
        torch.testing.assert_close(twin.state()[name], tensor, rtol=1e-4, atol=1e-5)


def test_same_seed_same_weights_and_nobody_elses_random_state(insert: Insert, methods: dict[str, Any]) -> None:
    one, two, other = insert(dropout=0.3), insert(dropout=0.3), insert(dropout=0.3)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = _fit(one, methods)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    random.seed(99)
    second = _fit(two, methods)
    assert _same(one.state(), two.state())
    assert first.curve == second.curve
    _fit(other, methods, seed=4)
    assert not _same(one.state(), other.state())


def test_warmup_of_a_single_step_still_moves(insert: Insert, methods: dict[str, Any]) -> None:
    inserted = insert()
    before = inserted.state()
    _fit(inserted, methods, ToyTask(batch_size=32), TrainSettings(epochs=1), watch=None)
    assert not torch.equal(inserted.state()["adapter/first/lora/up"], before["adapter/first/lora/up"])


@pytest.mark.parametrize("stop_at", [1, 4])
def test_stopped_at_a_rung_and_continued_equals_uninterrupted(
    insert: Insert, methods: dict[str, Any], tmp_path: Path, stop_at: int
) -> None:
    whole, parts = insert(dropout=0.3), insert(dropout=0.3)
    expected = _fit(whole, methods)
    first = _fit(parts, methods, max_epochs=stop_at, checkpoint=Checkpoint(tmp_path))
    assert first.epochs == stop_at
    assert first.curve == expected.curve[:stop_at]
    parts = insert(dropout=0.3)
    seen: list[tuple[int, float]] = []
    result = _fit(parts, methods, checkpoint=Checkpoint(tmp_path), on_epoch=lambda *point: bool(seen.append(point)))
    assert _same(whole.state(), parts.state())
    assert result.curve == expected.curve == tuple(seen)
    assert (result.losses, result.metrics, result.steps) == (expected.losses, expected.metrics, expected.steps)
    # The first stretch is counted in; what it took after its checkpoint was saved is not.
    assert result.seconds > 0.5 * first.seconds


class Interrupted(ToyTask):
    """Sends a signal to itself during one step of one epoch."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        self.at -= model.training
        if self.at == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().losses(model, batch)


@pytest.mark.parametrize("at", [1, 4, 6, 11])
def test_preempted_within_an_epoch_and_continued_equals_uninterrupted(
    insert: Insert, methods: dict[str, Any], tmp_path: Path, at: int
) -> None:
    whole, parts, fresh = insert(dropout=0.3), insert(dropout=0.3), insert(dropout=0.3)
    expected = _fit(whole, methods)
    checkpoint = Checkpoint(tmp_path)
    with preemptible(), pytest.raises(Preempted, match="the training is saved"):
        _fit(parts, methods, Interrupted(at), checkpoint=checkpoint)
    assert checkpoint.path.exists()
    assert not parts.model.training
    result = _fit(fresh, methods, checkpoint=checkpoint)
    assert _same(whole.state(), fresh.state())
    assert (result.curve, result.losses, result.metrics) == (expected.curve, expected.losses, expected.metrics)


def test_without_the_random_state_a_resumed_epoch_would_differ(
    insert: Insert, methods: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts, fresh = insert(dropout=0.3), insert(dropout=0.3), insert(dropout=0.3)
    _fit(whole, methods)
    with preemptible(), pytest.raises(Preempted):
        _fit(parts, methods, Interrupted(6), checkpoint=Checkpoint(tmp_path))
    monkeypatch.setattr("autopeft.training.loop._Run._set_rng", lambda self: None)
    _fit(fresh, methods, checkpoint=Checkpoint(tmp_path))
    assert not _same(whole.state(), fresh.state())


def test_preempted_without_a_checkpoint_says_so(insert: Insert, methods: dict[str, Any]) -> None:
    with preemptible(), pytest.raises(Preempted, match="keeps no checkpoint"):
        _fit(insert(), methods, Interrupted(2))


def test_another_seed_or_rate_does_not_resume(insert: Insert, methods: dict[str, Any], tmp_path: Path) -> None:
    _fit(insert(), methods, max_epochs=2, checkpoint=Checkpoint(tmp_path))
    for change in ({"seed": 4}, {"settings": TrainSettings(epochs=6)}, {"splits": ("inner", "outer")}):
        expected, found = insert(), insert()
        _fit(expected, methods, **change)
        _fit(found, methods, checkpoint=Checkpoint(tmp_path / "copy"), **change)
        assert _same(expected.state(), found.state())
    other = insert(seed=1)
    expected_other = insert(seed=1)
    _fit(expected_other, methods)
    _fit(other, methods, checkpoint=Checkpoint(tmp_path))
    assert _same(expected_other.state(), other.state())


def test_checkpoints_are_spaced_by_time(insert: Insert, methods: dict[str, Any], tmp_path: Path) -> None:
    _fit(insert(), methods, checkpoint=Checkpoint(tmp_path / "late", every_seconds=1e6))
    assert not (tmp_path / "late").exists()
    _fit(insert(), methods, checkpoint=Checkpoint(tmp_path / "often", every_seconds=0))
    assert Checkpoint(tmp_path / "often").path.exists()


def test_pruned(insert: Insert, methods: dict[str, Any]) -> None:
    result = _fit(insert(), methods, on_epoch=lambda epoch, value: epoch == 2)
    assert result.stopped
    assert (result.epochs, len(result.curve), result.sample_epochs) == (2, 2, 64)


def test_a_training_pruned_in_an_earlier_process_stays_pruned(
    insert: Insert, methods: dict[str, Any], tmp_path: Path
) -> None:
    _fit(insert(), methods, max_epochs=3, checkpoint=Checkpoint(tmp_path))
    result = _fit(insert(), methods, checkpoint=Checkpoint(tmp_path), on_epoch=lambda epoch, value: epoch == 2)
    assert result.stopped
    assert result.epochs == 3


def test_two_splits_are_walked_together(insert: Insert, methods: dict[str, Any]) -> None:
    result = _fit(insert(), methods, splits=("inner", "outer"), watch=None)
    assert (result.steps, result.sample_epochs) == (36, 6 * 48)
    assert result.curve == ()
    assert result.metrics == {}


class Plain:
    """A task with nothing but the contract: batches have no length, splits cannot be joined."""

    def __init__(self, task: ToyTask) -> None:
        self._task = task

    def __getattr__(self, name: str) -> Any:
        if name == "batches_of":
            raise AttributeError(name)
        return getattr(self._task, name)

    def batches(self, split: str, seed: int | None = None, batch_size: int | None = None) -> Any:
        yield from self._task.batches(split, seed, batch_size)  # type: ignore[arg-type]


def test_batches_without_a_length_are_counted(insert: Insert, methods: dict[str, Any]) -> None:
    one, two = insert(), insert()
    assert _fit(one, methods, Plain(ToyTask())).steps == _fit(two, methods).steps
    assert _same(one.state(), two.state())


def test_splits_that_cannot_be_joined(insert: Insert, methods: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"inner \+ outer together: Plain has no batches_of"):
        _fit(insert(), methods, Plain(ToyTask()), splits=("inner", "outer"))


def test_divergence_names_step_value_and_remedy(insert: Insert, methods: dict[str, Any]) -> None:
    inserted = insert()
    settings = TrainSettings(epochs=6, lr=LearningRates(head=1e30, matrix=1e30), clip=0)
    wanted = r"(loss|gradient) became (nan|inf) at step \d+ .*lora 5.7735e\+29 to 2.3094e\+30, .*train.lr_scale"
    with pytest.raises(Diverged, match=wanted):
        _fit(inserted, methods, settings=settings)


def test_a_nan_loss_stops_at_its_step(insert: Insert, methods: dict[str, Any]) -> None:
    class Poisoned(ToyTask):
        steps = 0

        def loss(self, model: nn.Module, batch: Any) -> Tensor:
            self.steps += 1
            return super().loss(model, batch) * (float("nan") if self.steps == 6 else 1.0)

    task = Poisoned()
    with pytest.raises(Diverged, match=r"loss became nan at step 6 \(epoch 2 of 6\)"):
        _fit(insert(), methods, task)
    assert task.steps == 6


def test_a_dead_adapter_is_found(insert: Insert, methods: dict[str, Any]) -> None:
    inserted = insert()
    inserted.model.used = False
    with pytest.raises(DeadAdapter, match="first/lora"):
        _fit(inserted, methods)


def test_an_adapter_that_cannot_learn_is_found_after_one_epoch(insert: Insert, methods: dict[str, Any]) -> None:
    inserted = insert()
    inserted.adapter.register_forward_hook(lambda module, args, output: output * 0)
    with pytest.raises(DeadAdapter, match="zero in each of 4 steps"):
        _fit(inserted, methods)


def test_the_third_count(insert: Insert, methods: dict[str, Any]) -> None:
    with pytest.raises(BudgetMismatch):
        _fit(insert(price=400), methods)


def test_bf16_changes_the_forward_and_keeps_the_weights_in_float32(insert: Insert, methods: dict[str, Any]) -> None:
    plain, mixed = insert(), insert()
    _fit(plain, methods)
    result = _fit(mixed, methods, settings=TrainSettings(epochs=6, lr=SETTINGS.lr, amp="bf16"))
    assert all(t.dtype == torch.float32 for t in mixed.state().values())
    assert not _same(plain.state(), mixed.state())
    assert result.metrics["top1"] > 0.8


def test_clipping_bounds_the_step(insert: Insert, methods: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    norms: list[float] = []
    step = torch.optim.AdamW.step

    def spy(self: torch.optim.AdamW, closure: Any = None) -> Any:
        grads = [p.grad for g in self.param_groups for p in g["params"]]
        norms.append(torch.nn.utils.get_total_norm(grads).item())
        return step(self, closure)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    _fit(insert(), methods, settings=TrainSettings(epochs=2, clip=0.05))
    assert max(norms) <= 0.05 * (1 + 1e-4)
    clipped = len(norms)
    _fit(insert(), methods, settings=TrainSettings(epochs=2, clip=0))
    assert max(norms[clipped:]) > 0.05


def test_threads_are_set_and_put_back(insert: Insert, methods: dict[str, Any]) -> None:
    assert _fit(insert(), methods, settings=TrainSettings(epochs=1, threads=2)).threads == 2
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_epochs": 0}, "max_epochs must be at least 1"),
        ({"watch": None, "on_epoch": lambda e, v: False}, "on_epoch is called with a metric"),
        ({"metric": "map50"}, "no metric 'map50'; it has ece, macro_f1, nll, scaled_nll, top1"),
        ({"device": "meta"}, "lies on cpu"),
    ],
)
def test_arguments_that_do_not_fit(
    insert: Insert, methods: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        _fit(insert(), methods, **change)


def test_a_fraction_of_the_data_is_another_one_each_epoch(insert: Insert, methods: dict[str, Any]) -> None:
    seen: list[list[float]] = []

    class Watched(ToyTask):
        def loss(self, model: nn.Module, batch: Any) -> Tensor:
            seen.append(batch[0].sum((1, 2, 3)).tolist())
            return super().loss(model, batch)

    result = _fit(insert(), methods, Watched(), TrainSettings(epochs=6, data_fraction=0.3), watch=None)
    # Two of four batches of 8 per epoch: 0.3 is rounded up to whole batches.
    assert (result.epochs, result.steps, result.sample_epochs) == (6, 12, 96)
    epochs = [frozenset(seen[2 * i] + seen[2 * i + 1]) for i in range(6)]
    assert all(len(epoch) == 16 for epoch in epochs)
    assert len(set(epochs)) == 6
    with pytest.raises(UsageError, match="data_fraction"):
        TrainSettings(data_fraction=0.0)
