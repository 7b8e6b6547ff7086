"""What tasks with one class label per image have in common: loss, prediction, order of batches, the seal."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autopeft.core.outcome import Split
from autopeft.errors import Diverged, UsageError
from autopeft.tasks._seal import Seal
from autopeft.tasks.metrics import classification_metrics

__all__ = ["Batch", "LabelledTask", "Row", "device_of", "evaluating"]

Batch = tuple[Tensor, Tensor]
"""Images, float32 of shape (batch, channels, height, width), and labels, int64 of shape (batch,), on the CPU."""

Row = tuple[Split, int]
"""A split and the number of a sample in it."""


class _Batches:
    """Batches that can be walked more than once, each time the same."""

    def __init__(self, task: LabelledTask, splits: tuple[Split, ...], seed: int | None, batch_size: int) -> None:
        self._task, self._splits, self._seed, self._batch_size = task, splits, seed, batch_size

    def __len__(self) -> int:
        return -(-sum(self._task.sizes[split] for split in self._splits) // self._batch_size)

    def __iter__(self) -> Iterator[Any]:
        rows: list[Row] = [(split, i) for split in self._splits for i in range(self._task.sizes[split])]
        generator = None
        if self._seed is not None:
            generator = torch.Generator().manual_seed(self._seed)
            rows = [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]
        chunks = [rows[i : i + self._batch_size] for i in range(0, len(rows), self._batch_size)]
        return self._task.walk(chunks, generator if "inner" in self._splits else None)


class LabelledTask(ABC):
    """Base of the tasks that classify images; satisfies `autopeft.core.contracts.Task`.

    Args:
        classes: class names in label order.
        labels: the labels of each split.
        batch_size: samples per batch unless asked otherwise.
        label_smoothing: of the loss, between 0 and 1; metrics never smooth.
        folder: the run folder, for the seal's marker.
        token: see `Seal`.
    """

    def __init__(
        self,
        classes: tuple[str, ...],
        labels: Mapping[Split, Sequence[int]],
        batch_size: int,
        label_smoothing: float = 0.0,
        folder: Path | None = None,
        token: str | None = None,
    ) -> None:
        self._classes = classes
        self._labels: dict[Split, Tensor] = {k: torch.tensor(v, dtype=torch.int64) for k, v in labels.items()}
        self._batch_size = batch_size
        self._label_smoothing = label_smoothing
        self._seal = Seal(folder, token)

    @property
    @abstractmethod
    def data_hash(self) -> str:
        """Hash of the samples and the splits."""

    @abstractmethod
    def walk(self, chunks: Sequence[Sequence[Row]], generator: torch.Generator | None) -> Iterator[Any]:
        """The batches of these rows; augmented by `generator` when there is one."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, in label order."""
        return self._classes

    @property
    def sizes(self) -> Mapping[str, int]:
        """Samples per split."""
        return {split: len(labels) for split, labels in self._labels.items()}

    def batches(self, split: Split, seed: int | None = None, batch_size: int | None = None) -> _Batches:
        """Batches of one split; see `batches_of`."""
        return self.batches_of((split,), seed, batch_size)

    def batches_of(self, splits: tuple[Split, ...], seed: int | None = None, batch_size: int | None = None) -> _Batches:
        """Batches over the union of splits, which a final training on inner and outer together walks.

        Args:
            splits: which splits, without repetition.
            seed: seed of order and augmentation; without one the splits come one after another in file order,
                unaugmented. Only a walk that includes `inner` is augmented.
            batch_size: samples per batch; the task's own when None. The last batch may be smaller.

        Returns:
            A collection with a length (number of batches) that gives the same batches each time it is walked.

        Raises:
            StoreError: for the test split before `unseal_test`.
            UsageError: for an unknown or repeated split, or a batch size below 1.
        """
        known = get_args(Split)
        if not splits or len(set(splits)) != len(splits) or not set(splits) <= set(known):
            raise UsageError(f"splits must be distinct and among {', '.join(known)}; got {', '.join(splits) or 'none'}")
        if "test" in splits:
            self._seal.check()
        size = self._batch_size if batch_size is None else batch_size
        if size < 1:
            raise UsageError(f"a batch holds at least 1 sample, got batch_size={size}")
        return _Batches(self, splits, seed, size)

    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        """The cross-entropy of every sample, shape (batch,), in float32 on the model's device.

        Raises:
            UsageError: when the model does not have one output per class.
        """
        images, labels = batch
        device = device_of(model)
        logits = self._logits(model, images.to(device, non_blocking=True))
        target = labels.to(device, non_blocking=True)
        return F.cross_entropy(logits, target, reduction="none", label_smoothing=self._label_smoothing)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The mean of `losses`."""
        return self.losses(model, batch).mean()

    def predict(self, model: nn.Module, split: Split) -> tuple[Tensor, Tensor]:
        """Float32 logits of shape (n, classes) and labels of shape (n,), on the CPU, in file order.

        Modes of all modules and all random state are left as found.

        Raises:
            StoreError: for the test split before `unseal_test`.
        """
        device = device_of(model)
        logits, labels = [], []
        batches = self.batches(split)
        # Not inference_mode: a model that caches a tensor then (a position table) could not be trained afterwards.
        with evaluating(model, device), torch.no_grad():
            for images, target in batches:
                logits.append(self._logits(model, images.to(device, non_blocking=True)).cpu())
                labels.append(target)
        return torch.cat(logits), torch.cat(labels)

    def evaluate(self, model: nn.Module, split: Split) -> Mapping[str, float]:
        """`top1`, `macro_f1`, `ece`, `nll` and `scaled_nll` on a split, in evaluation mode.

        Raises:
            StoreError: for the test split before `unseal_test`.
            Diverged: when the model's outputs are not finite.
        """
        logits, labels = self.predict(model, split)
        if not bool(torch.isfinite(logits).all()):
            raise Diverged(f"the model's outputs on split {split!r} are not finite; lower the learning rate")
        return classification_metrics(logits, labels)

    def unseal_test(self) -> None:
        """Open the test split.

        Raises:
            StoreError: the second time, also in another process on the same run folder, unless the task was opened
                with the `unseal_token` that the marker carries.
        """
        self._seal.open()

    def _logits(self, model: nn.Module, images: Tensor) -> Tensor:
        output = model(images)
        logits = getattr(output, "logits", output)
        if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[1] != len(self._classes):
            found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise UsageError(
                f"the model must return logits of shape (batch, {len(self._classes)}), one per class; it returned "
                f"{found}. Give it a classifier for these classes"
            )
        return logits.float()


def device_of(model: nn.Module) -> torch.device:
    """Where the model's parameters lie."""
    for tensor in model.parameters():
        return tensor.device
    return torch.device("cpu")


@contextlib.contextmanager
def evaluating(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode; afterwards every module's own mode and the random state are as before."""
    modes = [(module, module.training) for module in model.modules()]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            model.eval()
            yield
        finally:
            for module, mode in modes:
                # `train(mode)` would set the children too.
                module.training = mode
