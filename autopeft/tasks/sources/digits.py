"""The UCI digits that scikit-learn carries: 1,797 grey 8x8 images of ten classes, offline."""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt
from PIL import Image

from autopeft.tasks.sources.source import Sample, Source

__all__ = ["DIGITS_COUNTS", "open_digits"]

DIGITS_COUNTS = (500, 400, 897)
"""Inner, outer and test samples unless asked otherwise: training is short, and the test split large enough to judge."""


def open_digits() -> Source:
    """The digits as one tree; greys from 0 to 16 become 0 to 255."""
    from sklearn.datasets import load_digits

    data = load_digits()
    pixels: npt.NDArray[np.uint8] = np.rint(data.images * (255 / 16)).astype(np.uint8)
    samples = tuple(
        Sample(f"digits/{i:04d}", int(label), functools.partial(_load, pixels[i]))
        for i, label in enumerate(data.target)
    )
    return Source("the bundled digits", tuple(str(c) for c in range(10)), {"all": samples}, DIGITS_COUNTS)


def _load(pixels: npt.NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(pixels).convert("RGB")
