"""Image classification."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from autopeft.core.outcome import Split
from autopeft.errors import UsageError
from autopeft.store.paths import RunFolder
from autopeft.tasks._found import found_again
from autopeft.tasks._labelled import Batch, LabelledTask, Row
from autopeft.tasks._options import DataOptions
from autopeft.tasks._pixels import PixelStore, Preprocessing
from autopeft.tasks.cut import CutRule, cut
from autopeft.tasks.sources.open import open_source
from autopeft.tasks.sources.source import Sample
from autopeft.tasks.splits import Splits

__all__ = ["Augment", "Classification"]

Augment = Literal["none", "flip", "crop"]
"""`flip` mirrors half of the images; `crop` shifts each by up to an eighth of its size, with reflected borders."""

_SPLITS: tuple[Split, ...] = get_args(Split)


@dataclass(frozen=True, slots=True)
class Classification:
    """One label per image; cross-entropy; top-1, macro-F1, calibration error and likelihood.

    Attributes:
        label_smoothing: of the training loss, in [0, 1).
        augment: what is done to training images, after the model's own preprocessing.
        cache_mb: millions of bytes of preprocessed images that are kept in memory; a split is kept whole or not at
            all. Images are kept as bytes: 3,400 of 3 x 224 x 224 fit the default.

    Raises:
        UsageError: for values outside of these ranges.
    """

    label_smoothing: float = 0.0
    augment: Augment = "none"
    cache_mb: int = 512

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise UsageError(f"label_smoothing must lie in [0, 1), got {self.label_smoothing}")
        if self.augment not in get_args(Augment):
            raise UsageError(f"augment must be one of {', '.join(get_args(Augment))}, got {self.augment!r}")
        if self.cache_mb < 0:
            raise UsageError(f"cache_mb must be at least 0, got {self.cache_mb}")

    def open(
        self, data: str, data_config: Mapping[str, Any], folder: Path | None, seed: int, options: Mapping[str, Any]
    ) -> LabelledTask:
        """Open a data specification as a task; satisfies `autopeft.core.contracts.TaskSpec`.

        The first time every image is decoded once: corrupt files show before anything is trained, and images that
        are in two splits are found (see `Splits.without_leaks`). The cut is written to `splits.json` in the run
        folder and read back from there later; images whose pixels have changed since are refused when they are read.

        Args:
            data: a folder, `torch/...`, `hfds/...`, `csv:...` or `digits`; see `autopeft.tasks.sources`.
            data_config: the model's preprocessing, as `timm.data.resolve_model_data_config` gives it.
            folder: the run folder; None writes nothing.
            seed: seed of the cut.
            options: `batch_size` (64), `val_frac` and `test_frac` (0.2), `max_samples`, `max_inner`, `workers`
                (decoding threads), `download` (False) and `unseal_token`: a finish that may be cut off and continued
                opens its task with a token of its own; `unseal_test` then also succeeds on a folder whose marker
                carries this token. None is the same as leaving an option out.

        Raises:
            DataError: for data that is absent, corrupt, empty, of one class, or has a class that is not in every split.
            UsageError: for a specification or option that nobody knows.
            StaleRun: when the folder's splits were made with other options, or of other data.
            MissingDependency: when a package is absent that the specification needs.
        """
        checked = DataOptions.of(options)
        rule = CutRule(seed, checked.val_frac, checked.test_frac, checked.max_samples, checked.max_inner)
        store = PixelStore(Preprocessing(data_config), self.cache_mb * 1_000_000, checked.threads)
        source = open_source(data, checked.download)
        path = None if folder is None else RunFolder(folder).splits
        if path is not None and path.exists():
            splits = Splits.read(path)
            samples = found_again(splits, rule, source, path)
            for split in _SPLITS:
                store.reserve(splits[split].names)
                store.expect(dict(zip(splits[split].names, splits[split].pixels, strict=True)))
        else:
            planned = cut(source, rule)
            for split in _SPLITS:
                store.reserve([s.name for s in planned[split]])
            pixels = store.hashes([s for split in _SPLITS for s in planned[split]])
            splits = Splits.without_leaks(source.classes, rule, planned, pixels)
            kept = {name for split in _SPLITS for name in splits[split].names}
            samples = {split: tuple(s for s in planned[split] if s.name in kept) for split in _SPLITS}
            if path is not None:
                splits.write(path)
        return _ImageTask(self, splits, samples, store, checked, folder)


class _ImageTask(LabelledTask):
    """What `Classification.open` gives."""

    def __init__(
        self,
        spec: Classification,
        splits: Splits,
        samples: Mapping[Split, Sequence[Sample]],
        store: PixelStore,
        options: DataOptions,
        folder: Path | None,
    ) -> None:
        super().__init__(
            splits.classes,
            {split: splits[split].labels for split in _SPLITS},
            options.batch_size,
            spec.label_smoothing,
            folder,
            options.unseal_token,
        )
        self._augment = spec.augment
        self._samples = samples
        self._store = store
        self._hash = splits.digest

    @property
    def data_hash(self) -> str:
        """Hash of names, labels, pixels and splits: 16 hexadecimal digits."""
        return self._hash

    def walk(self, chunks: Sequence[Sequence[Row]], generator: torch.Generator | None) -> Iterator[Batch]:
        """The batches of these rows; augmented by `generator` when there is one."""
        wanted = [[self._samples[split][i] for split, i in rows] for rows in chunks]
        for rows, pixels in zip(chunks, self._store.batches(wanted), strict=True):
            images = self._store.preprocessing.to_input(pixels)
            if generator is not None:
                images = _augmented(images, self._augment, generator)
            yield images, torch.stack([self._labels[split][i] for split, i in rows])


def _augmented(images: Tensor, kind: Augment, generator: torch.Generator) -> Tensor:
    """Images of shape (batch, channels, height, width), each changed on its own."""
    if kind == "flip":
        mirrored = torch.rand(len(images), generator=generator) < 0.5
        return torch.where(mirrored.view(-1, 1, 1, 1), images.flip(3), images)
    if kind == "crop":
        height, width = images.shape[2:]
        dy, dx = max(1, height // 8), max(1, width // 8)
        padded = F.pad(images, (dx, dx, dy, dy), mode="reflect")
        tops = torch.randint(0, 2 * dy + 1, (len(images),), generator=generator).tolist()
        lefts = torch.randint(0, 2 * dx + 1, (len(images),), generator=generator).tolist()
        shifted = [image[:, y : y + height, x : x + width] for image, y, x in zip(padded, tops, lefts, strict=True)]
        return torch.stack(shifted)
    return images
