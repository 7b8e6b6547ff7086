"""Laws of tasks, as tests to inherit."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from autopeft.core.contracts import Task
from autopeft.core.outcome import Split
from autopeft.errors import AutopeftError

__all__ = ["TaskLaws"]

_SPLITS: tuple[Split, ...] = get_args(Split)


class TaskLaws:
    """Every task passes these; inherit, name the class `Test...` and fill in `open`.

    A batch begins with images and labels. `model` and `predicted` are for classification; other tasks override them.

    `autopeft.testing.broken_tasks` holds one task per law that breaks it. Each law opens its own task in its own
    folder. Samples are told apart by their unaugmented pixels, so the data
    under test must hold no image twice.
    """

    def open(self, folder: Path) -> Task:
        """Open the task with `folder` as run folder; called twice on one folder, it reopens."""
        raise NotImplementedError

    def model(self, task: Task) -> nn.Module:
        """A model of the task, with parts that behave differently in training: BatchNorm, dropout, mixed modes."""
        images = next(iter(task.batches("inner")))[0]
        size = images[0].numel()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            classifier = nn.Linear(size, len(task.classes))
        model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(size), nn.Dropout(0.5), classifier).train()
        model[1].eval()
        return model

    def predicted(self, task: Task, model: nn.Module, batch: Any) -> Tensor:
        """What `predict` should give for a batch in evaluation order; the model is in evaluation mode."""
        logits: Tensor = model(batch[0])
        return logits

    def test_every_class_is_in_every_split(self, tmp_path: Path) -> None:
        task = self._opened(tmp_path)
        for split in _SPLITS:
            found = {int(y) for _, labels, *_ in task.batches(split) for y in labels}
            assert found == set(range(len(task.classes))), f"split {split} has labels {sorted(found)}"

    def test_sizes_and_types_are_as_stated(self, tmp_path: Path) -> None:
        task = self._opened(tmp_path)
        for split in _SPLITS:
            for size in (None, 3):
                batches = list(task.batches(split, batch_size=size))
                n = sum(len(labels) for _, labels, *_ in batches)
                assert n == task.sizes[split], f"split {split} states {task.sizes[split]} samples and gives {n}"
                for images, labels, *_ in batches:
                    assert images.dtype == torch.float32, f"images are {images.dtype}"
                    assert images.ndim == 4, f"images have shape {tuple(images.shape)}"
                    assert labels.dtype == torch.int64, f"labels are {labels.dtype}"
                    assert labels.shape == images.shape[:1], f"labels have shape {tuple(labels.shape)}"
                    assert size is None or len(labels) <= size, f"asked for {size} samples, got {len(labels)}"

    def test_splits_are_disjoint(self, tmp_path: Path) -> None:
        task = self._opened(tmp_path)
        seen: dict[str, Split] = {}
        for split in _SPLITS:
            for key in set(_keys(task.batches(split))):
                assert key not in seen, f"an image is in {seen.get(key)} and in {split}"
                seen[key] = split

    def test_same_split_and_seed_give_the_same_batches(self, tmp_path: Path) -> None:
        task = self.open(tmp_path)
        for seed in (None, 0, 1):
            assert _same(task.batches("inner", seed), task.batches("inner", seed)), f"seed {seed} gave other batches"
            torch.rand(1)
            batches = task.batches("inner", seed)
            assert _same(batches, batches), "walking the same batches twice gave others"

    def test_the_seed_shuffles_and_nothing_else(self, tmp_path: Path) -> None:
        task = self.open(tmp_path)
        before = torch.get_rng_state()
        plain = _labels(task.batches("outer"))
        orders = [_labels(task.batches("outer", seed)) for seed in range(4)]
        assert torch.equal(torch.get_rng_state(), before), "walking batches changed the random state"
        assert any(not torch.equal(orders[0], other) for other in orders[1:]), "every seed gave the same order"
        images = Counter(_keys(task.batches("outer")))
        for seed, labels in enumerate(orders):
            assert torch.equal(labels.sort().values, plain.sort().values), f"seed {seed} changed the labels"
            assert Counter(_keys(task.batches("outer", seed))) == images, f"seed {seed} changed images of outer"

    def test_loss_is_the_mean_of_losses_and_has_a_gradient(self, tmp_path: Path) -> None:
        task = self.open(tmp_path)
        model = self.model(task).eval()
        batch = next(iter(task.batches("inner", 0)))
        loss, losses = task.loss(model, batch), task.losses(model, batch)
        assert loss.ndim == 0, f"the loss has shape {tuple(loss.shape)}"
        assert math.isfinite(float(loss.detach())), f"the loss is {float(loss.detach())}"
        assert losses.shape == (len(batch[1]),), f"losses have shape {tuple(losses.shape)}"
        torch.testing.assert_close(loss, losses.mean())
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it without annotations
        gradients = [p.grad for p in model.parameters()]
        assert any(g is not None and bool(g.any()) for g in gradients), "the loss has no gradient"

    def test_evaluating_leaves_the_model_alone(self, tmp_path: Path) -> None:
        task = self.open(tmp_path)
        model = self.model(task)
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        modes = [module.training for module in model.modules()]
        random = torch.get_rng_state()
        for call in (task.evaluate, task.predict):
            call(model, "outer")
            assert [module.training for module in model.modules()] == modes, "the mode of a module was changed"
            assert all(torch.equal(state[name], t) for name, t in model.state_dict().items()), "a tensor was changed"
            assert torch.equal(torch.get_rng_state(), random), "the random state was changed"
            assert all(p.grad is None for p in model.parameters()), "a gradient was left behind"

    def test_predictions_are_made_in_evaluation_mode_and_file_order(self, tmp_path: Path) -> None:
        task = self.open(tmp_path)
        model = self.model(task)
        logits, labels = task.predict(model, "outer")
        model.eval()
        with torch.no_grad():
            wanted = torch.cat([self.predicted(task, model, batch) for batch in task.batches("outer")])
        torch.testing.assert_close(logits, wanted)
        assert torch.equal(labels, _labels(task.batches("outer"))), "labels are not in file order"
        metrics = task.evaluate(model, "outer")
        assert metrics, "evaluate measured nothing"
        assert all(math.isfinite(v) for v in metrics.values()), f"metrics are {dict(metrics)}"
        assert dict(metrics) == dict(task.evaluate(model, "outer")), "the same model was measured differently"

    def test_the_test_split_is_sealed(self, tmp_path: Path) -> None:
        task = self.open(tmp_path)
        model = self.model(task)
        calls: dict[str, Callable[[], Any]] = {
            "batches": lambda: task.batches("test"),
            "predict": lambda: task.predict(model, "test"),
            "evaluate": lambda: task.evaluate(model, "test"),
        }
        for name, call in calls.items():
            assert _refused(call), f"{name} opened the sealed test split"
        task.unseal_test()
        for call in calls.values():
            call()

    def test_the_test_split_opens_once(self, tmp_path: Path) -> None:
        task = self._opened(tmp_path)
        assert _refused(task.unseal_test), "the test split was opened twice"

    def test_the_test_split_opens_once_per_folder(self, tmp_path: Path) -> None:
        self._opened(tmp_path)
        again = self.open(tmp_path)
        assert _refused(lambda: again.batches("test")), "a reopened task starts with an open test split"
        assert _refused(again.unseal_test), "reopening the task opened the test split twice"

    def test_reopening_gives_the_same_data(self, tmp_path: Path) -> None:
        first, second = self.open(tmp_path), self.open(tmp_path)
        assert first.data_hash == second.data_hash, f"hashes are {first.data_hash} and {second.data_hash}"
        assert first.classes == second.classes, "classes differ"
        assert dict(first.sizes) == dict(second.sizes), "sizes differ"
        assert _same(first.batches("inner", 0), second.batches("inner", 0)), "batches differ"

    def _opened(self, folder: Path) -> Task:
        task = self.open(folder)
        task.unseal_test()
        return task


def _keys(batches: Any) -> list[str]:
    return [hashlib.sha256(image.numpy().tobytes()).hexdigest() for images, *_ in batches for image in images]


def _labels(batches: Any) -> Tensor:
    return torch.cat([labels for _, labels, *_ in batches])


def _same(ours: Any, theirs: Any) -> bool:
    first, second = list(ours), list(theirs)
    return len(first) == len(second) and all(
        (a is b is None) or torch.equal(a, b)
        for one, other in zip(first, second, strict=True)
        for a, b in zip(one, other, strict=True)
    )


def _refused(call: Callable[[], Any]) -> bool:
    try:
        call()
    except AutopeftError:
        return True
    return False
