"""One task per law of `autopeft.testing.task_laws` that breaks this law and keeps the others."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autopeft.core.contracts import Task
from autopeft.core.outcome import Split
from autopeft.testing.toy_task import ToyTask

__all__ = ["BROKEN"]


class _ClassMissing(ToyTask):
    """No sample of the last class in outer."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder=folder)
        self._labels["outer"] = self._labels["outer"] % 3


class _WholeSplits(ToyTask):
    """Gives 8 samples at a time, whatever is asked for."""

    def batches(self, split: Split, seed: int | None = None, batch_size: int | None = None) -> Any:
        return super().batches(split, seed)


class _Leaking(ToyTask):
    """The first image of inner is in outer too."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder=folder)
        self._images["outer"][0] = self._images["inner"][0]


class _Restless(ToyTask):
    """Another order each time the same one is asked for."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder=folder)
        self._calls = itertools.count()

    def batches(self, split: Split, seed: int | None = None, batch_size: int | None = None) -> Any:
        return super().batches(split, None if seed is None else seed + 100 * next(self._calls), batch_size)


class _AugmentsOuter(ToyTask):
    """Changes the images that the search looks at."""

    def batches(self, split: Split, seed: int | None = None, batch_size: int | None = None) -> Any:
        batches = super().batches(split, seed, batch_size)
        if split != "outer" or seed is None:
            return batches
        return [(images.flip(3), labels) for images, labels in batches]


class _Sum(ToyTask):
    """The loss is the sum over the batch."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return self.losses(model, batch).sum()


class _LeavesEvaluationMode(ToyTask):
    """Forgets to restore the mode."""

    def predict(self, model: nn.Module, split: Split) -> tuple[Tensor, Tensor]:
        found = super().predict(model, split)
        model.eval()
        return found


class _ShuffledPredictions(ToyTask):
    """Predicts in another order than that of the file."""

    def predict(self, model: nn.Module, split: Split) -> tuple[Tensor, Tensor]:
        logits, labels = super().predict(model, split)
        order = torch.arange(len(labels) - 1, -1, -1)
        return logits[order], labels[order]


class _Peeking(ToyTask):
    """Evaluates on the sealed test split."""

    def evaluate(self, model: nn.Module, split: Split) -> Mapping[str, float]:
        was_open, self._seal.is_open = self._seal.is_open, True
        try:
            return super().evaluate(model, split)
        finally:
            self._seal.is_open = was_open


class _OpensAgain(ToyTask):
    """Lets its own test split be opened as often as one likes."""

    def unseal_test(self) -> None:
        if not self._seal.is_open:
            super().unseal_test()


class _Forgetful(ToyTask):
    """Does not remember in the folder that the test split was opened."""

    def __init__(self, folder: Path) -> None:
        super().__init__()


_fresh = itertools.count()


class _NewEachTime(ToyTask):
    """Other data each time it is opened."""

    def __init__(self, folder: Path) -> None:
        super().__init__(seed=next(_fresh), folder=folder)


def _in(kind: Callable[..., Task]) -> Callable[[Path], Task]:
    return lambda folder: kind(folder=folder)


BROKEN: Mapping[str, Callable[[Path], Task]] = {
    "test_every_class_is_in_every_split": _ClassMissing,
    "test_sizes_and_types_are_as_stated": _in(_WholeSplits),
    "test_splits_are_disjoint": _Leaking,
    "test_same_split_and_seed_give_the_same_batches": _Restless,
    "test_the_seed_shuffles_and_nothing_else": _in(_AugmentsOuter),
    "test_loss_is_the_mean_of_losses_and_has_a_gradient": _in(_Sum),
    "test_evaluating_leaves_the_model_alone": _in(_LeavesEvaluationMode),
    "test_predictions_are_made_in_evaluation_mode_and_file_order": _in(_ShuffledPredictions),
    "test_the_test_split_is_sealed": _in(_Peeking),
    "test_the_test_split_opens_once": _in(_OpensAgain),
    "test_the_test_split_opens_once_per_folder": _Forgetful,
    "test_reopening_gives_the_same_data": _NewEachTime,
}
"""Law to a way of opening a task that breaks this law alone."""
