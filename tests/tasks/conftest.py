from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

Tree = Callable[[Mapping[str, int]], Path]


@pytest.fixture
def picture() -> Callable[[Path, int], None]:
    """Write a small image of noise; equal numbers give equal pixels."""

    def write(path: Path, number: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (10, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)

    return write


@pytest.fixture
def tree(tmp_path: Path, picture: Callable[[Path, int], None]) -> Tree:
    """Write a folder of PNGs, none twice: `{"train/cat": 3}` makes three images there."""

    def write(counts: Mapping[str, int]) -> Path:
        root = tmp_path / "data"
        number = 0
        for folder, n in counts.items():
            (root / folder).mkdir(parents=True, exist_ok=True)
            for i in range(n):
                picture(root / folder / f"img{i}.png", number)
                number += 1
        return root

    return write


@pytest.fixture
def config() -> dict[str, Any]:
    return {
        "input_size": (3, 8, 8),
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "crop_pct": 0.9,
        "crop_mode": "center",
    }
