"""A task made of noise and four patterns: small, in memory, and learnable."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from autopeft.core.outcome import Split
from autopeft.errors import UsageError
from autopeft.tasks._labelled import Batch, LabelledTask, Row

__all__ = ["ToyTask"]


class ToyTask(LabelledTask):
    """An in-memory classification task that satisfies the `Task` contract.

    Every class has its own pattern of unit Gaussian noise; a sample is its class's pattern plus `noise` times fresh
    noise. Labels take turns, so every split holds every class. Nothing is augmented. The test split is sealed, for
    the life of the object or, with a folder, for good.

    Args:
        n_inner: samples of the inner split, at least one per class.
        n_outer: samples of the outer split.
        n_test: samples of the test split.
        classes: number of classes.
        size: height and width of the images.
        channels: channels of the images.
        seed: of patterns and noise.
        batch_size: samples per batch.
        noise: standard deviation of the noise.
        folder: where the seal of the test split is remembered.
    """

    def __init__(
        self,
        n_inner: int = 32,
        n_outer: int = 16,
        n_test: int = 16,
        classes: int = 4,
        size: int = 8,
        channels: int = 3,
        seed: int = 0,
        batch_size: int = 8,
        noise: float = 0.5,
        folder: Path | None = None,
    ) -> None:
        counts: dict[Split, int] = {"inner": n_inner, "outer": n_outer, "test": n_test}
        for split, n in counts.items():
            if n < classes:
                raise UsageError(f"the {split} split needs a sample of each of the {classes} classes, got {n}")
        super().__init__(
            tuple(f"class{c}" for c in range(classes)),
            {split: [i % classes for i in range(n)] for split, n in counts.items()},
            batch_size,
            folder=folder,
        )
        generator = torch.Generator().manual_seed(seed)
        shape = (channels, size, size)
        patterns = torch.randn(classes, *shape, generator=generator)
        self._images: dict[Split, Tensor] = {
            split: patterns[labels] + noise * torch.randn(len(labels), *shape, generator=generator)
            for split, labels in self._labels.items()
        }

    @property
    def data_hash(self) -> str:
        """Hash of the samples and the splits: 16 hexadecimal digits."""
        digest = hashlib.sha256()
        for split, images in self._images.items():
            digest.update(split.encode() + images.numpy().tobytes() + self._labels[split].numpy().tobytes())
        return digest.hexdigest()[:16]

    def recall_batches(self, batch_size: int) -> Iterator[Batch]:
        """The first eight samples of inner (`autopeft.core.contracts.Recalling`)."""
        rows: list[Row] = [("inner", i) for i in range(min(8, self.sizes["inner"]))]
        yield from self.walk([rows[i : i + batch_size] for i in range(0, len(rows), batch_size)], None)

    def recall(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean squared difference of the outputs for images and for blank ones: a stand-in for a noise difference."""
        images = batch[0].to(next(model.parameters()).device)
        difference: Tensor = model(images) - model(torch.zeros_like(images))
        return difference.square().mean()

    def walk(self, chunks: Sequence[Sequence[Row]], generator: torch.Generator | None) -> Iterator[Batch]:
        """The batches of these rows."""
        for rows in chunks:
            yield (
                torch.stack([self._images[split][i] for split, i in rows]),
                torch.stack([self._labels[split][i] for split, i in rows]),
            )
