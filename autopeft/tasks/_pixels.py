"""Images to the model's input: decoded once, kept in memory as bytes where they fit."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from autopeft.errors import StaleRun, UsageError
from autopeft.tasks.sources.source import Sample

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["PixelStore", "Preprocessing", "pixel_hash"]

_AHEAD = 2
"""Batches that are decoded while the consumer works on one."""


def pixel_hash(image: Image.Image) -> str:
    """32 hexadecimal digits of the SHA-256 of size and pixels of an image in 8-bit RGB."""
    return hashlib.sha256(b"%dx%d:" % image.size + image.tobytes()).hexdigest()[:32]


class Preprocessing:
    """The model's own evaluation preprocessing, in two halves: resize and crop to bytes, then scale.

    The two together are timm's evaluation transform, bit for bit. Between them an image takes a quarter of the memory.

    Args:
        data_config: as `timm.data.resolve_model_data_config` gives it.

    Raises:
        UsageError: when a setting is missing, or the model takes neither 1 nor 3 channels.
    """

    def __init__(self, data_config: Mapping[str, Any]) -> None:
        from timm.data import create_transform

        needed = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
        missing = [name for name in needed if name not in data_config]
        if missing:
            raise UsageError(f"the model's data config lacks {', '.join(missing)}")
        channels, height, width = (int(n) for n in data_config["input_size"])
        if channels not in (1, 3):
            raise UsageError(f"images have 1 or 3 channels, the model takes {channels}; choose another model")
        self.shape = (channels, height, width)
        self._resize = create_transform(
            input_size=self.shape,
            is_training=False,
            interpolation=data_config["interpolation"],
            mean=tuple(data_config["mean"]),
            std=tuple(data_config["std"]),
            crop_pct=data_config["crop_pct"],
            crop_mode=data_config["crop_mode"],
            normalize=False,
        )
        self._mean = _per_channel(data_config["mean"], channels, "mean")
        self._std = _per_channel(data_config["std"], channels, "std")

    def to_bytes(self, image: Image.Image) -> Tensor:
        """An image in RGB, resized and cropped: uint8 of shape (channels, height, width)."""
        pixels: Tensor = self._resize(image.convert("L") if self.shape[0] == 1 else image)
        return pixels

    def to_input(self, pixels: Tensor) -> Tensor:
        """A uint8 batch as the model takes it: float32 of the same shape."""
        return pixels.float().div_(255).sub_(self._mean).div_(self._std)


def _per_channel(values: Sequence[float], channels: int, name: str) -> Tensor:
    numbers = [float(v) for v in values]
    if len(numbers) != channels:
        # A model of 3 channels that was narrowed to 1 still carries the statistics of 3.
        if channels != 1 and len(numbers) != 1:
            raise UsageError(f"the model's data config has {len(numbers)} values of {name} for {channels} channels")
        numbers = [sum(numbers) / len(numbers)] * channels
    return torch.tensor(numbers, dtype=torch.float32).view(-1, 1, 1)


class _Pool(ThreadPoolExecutor):
    """Threads that drop what is still queued when the block is left early, by an error or by a consumer that stops."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown(wait=True, cancel_futures=True)


def _stack(pending: list[Future[Tensor]]) -> Tensor:
    return torch.stack([future.result() for future in pending])


class PixelStore:
    """Decodes samples, at most once for those that are kept.

    Args:
        preprocessing: the model's.
        limit: bytes that may be kept.
        threads: threads that decode.
    """

    def __init__(self, preprocessing: Preprocessing, limit: int, threads: int) -> None:
        self._preprocessing = preprocessing
        self._left = limit
        self._threads = threads
        self._rows: dict[str, tuple[Tensor, int]] = {}
        self._full: set[str] = set()
        self._expected: dict[str, str] = {}

    @property
    def preprocessing(self) -> Preprocessing:
        """The model's preprocessing."""
        return self._preprocessing

    def reserve(self, names: Sequence[str]) -> bool:
        """Keep these samples once decoded, all or none; False when they do not fit what is left of the limit."""
        channels, height, width = self._preprocessing.shape
        need = len(names) * channels * height * width
        if need > self._left:
            return False
        self._left -= need
        block = torch.empty((len(names), channels, height, width), dtype=torch.uint8)
        self._rows.update({name: (block, row) for row, name in enumerate(names)})
        return True

    def expect(self, hashes: Mapping[str, str]) -> None:
        """Refuse samples whose pixels are no longer these, when they are decoded."""
        self._expected.update(hashes)

    def hashes(self, samples: Sequence[Sample]) -> dict[str, str]:
        """Sample name to hash of its pixels; decodes every sample, and keeps those that are reserved.

        Raises:
            DataError: for an image that cannot be read.
        """
        names = [sample.name for sample in samples]
        if self._threads < 2:
            return dict(zip(names, map(self._decode_hash, samples), strict=True))
        with _Pool(self._threads) as pool:
            return dict(zip(names, pool.map(self._decode_hash, samples), strict=True))

    def batches(self, chunks: Sequence[Sequence[Sample]]) -> Iterator[Tensor]:
        """One uint8 tensor of shape (batch, channels, height, width) per chunk; decodes ahead of the consumer.

        Raises:
            DataError: for an image that cannot be read.
            StaleRun: for an image that is not the one that was expected.
        """
        if self._threads < 2 or all(sample.name in self._full for chunk in chunks for sample in chunk):
            for chunk in chunks:
                yield torch.stack([self._get(sample) for sample in chunk])
            return
        with _Pool(self._threads) as pool:
            ahead: deque[list[Future[Tensor]]] = deque()
            for chunk in chunks:
                ahead.append([pool.submit(self._get, sample) for sample in chunk])
                if len(ahead) > _AHEAD:
                    yield _stack(ahead.popleft())
            while ahead:
                yield _stack(ahead.popleft())

    def _get(self, sample: Sample) -> Tensor:
        if sample.name in self._full:
            block, row = self._rows[sample.name]
            return block[row]
        image = sample.load()
        if sample.name in self._expected and pixel_hash(image) != self._expected[sample.name]:
            raise StaleRun(
                f"the image {sample.name} is not the one this run began with; restore it or start a new run folder"
            )
        return self._keep(sample.name, image)

    def _decode_hash(self, sample: Sample) -> str:
        image = sample.load()
        self._keep(sample.name, image)
        return pixel_hash(image)

    def _keep(self, name: str, image: Image.Image) -> Tensor:
        if name not in self._rows:
            return self._preprocessing.to_bytes(image)
        block, row = self._rows[name]
        block[row] = self._preprocessing.to_bytes(image)
        self._full.add(name)
        return block[row]
