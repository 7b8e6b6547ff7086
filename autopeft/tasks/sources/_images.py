"""Reading image files, and errors that name them."""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image
from timm.data import get_img_extensions

from autopeft.errors import DataError

__all__ = ["EXTENSIONS", "natural_key", "read_image", "to_rgb"]

EXTENSIONS: frozenset[str] = frozenset(get_img_extensions()) | {".bmp", ".tif", ".tiff", ".webp"}
"""File name endings that are taken for images: timm's, and formats that Pillow always reads."""


def natural_key(text: str) -> list[int | str]:
    """Sort key by which `img2` comes before `img10`, as in timm."""
    return [int(s) if s.isdigit() else s for s in re.split(r"(\d+)", text.lower())]


def to_rgb(image: Image.Image) -> Image.Image:
    """The image in 8-bit RGB.

    Sixteen-bit greys are scaled down; Pillow's own conversion would turn everything above 255 white.
    """
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.int64).clip(0, 65535) >> 8
        image = Image.fromarray(grey.astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def read_image(file: Path | IO[bytes], name: str) -> Image.Image:
    """Decode an image file to 8-bit RGB.

    Args:
        file: a path or an open file.
        name: what to call it in messages.

    Raises:
        DataError: when it cannot be read or decoded whole.
    """
    try:
        with Image.open(file) as image:
            return to_rgb(image)
    except FileNotFoundError as error:
        raise DataError(f"the image {name} does not exist") from error
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise DataError(f"cannot read the image {name}: it is corrupt or not an image ({error}); remove it") from error
