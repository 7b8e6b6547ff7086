from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from autopeft.errors import DataError
from autopeft.tasks.sources._images import EXTENSIONS, natural_key, read_image, to_rgb


def test_names_are_sorted_as_people_count() -> None:
    assert sorted(["img10", "Img9", "a2b10", "a2b9"], key=natural_key) == ["a2b9", "a2b10", "Img9", "img10"]


def test_timms_endings_are_among_ours() -> None:
    assert {".png", ".jpg", ".jpeg", ".webp", ".tif"} <= EXTENSIONS


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    grey = Image.fromarray(np.full((4, 5), 255, dtype=np.uint8))
    found = to_rgb(grey.convert("RGB").convert(mode))
    assert (found.mode, found.size) == ("RGB", (5, 4))
    assert np.asarray(found).min() >= 250


def test_sixteen_bits_are_scaled(tmp_path: Path) -> None:
    values = np.array([[0, 256, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "x.png")
    assert np.asarray(read_image(tmp_path / "x.png", "x"))[0, :, 0].tolist() == [0, 1, 128, 255]
    assert np.asarray(to_rgb(Image.fromarray(values.astype(np.int32))))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_a_palette_with_transparency_is_read(tmp_path: Path) -> None:
    image = Image.fromarray(np.zeros((2, 2), dtype=np.uint8)).convert("P")
    image.save(tmp_path / "x.png", transparency=b"\x00\xff")
    assert read_image(tmp_path / "x.png", "x").mode == "RGB"


def good() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("content", [b"", b"no image", good()[:300], good()[:60] + b"\0" * 40 + good()[100:]])
def test_corrupt_images_are_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.png").write_bytes(content)
    with pytest.raises(DataError, match=r"cannot read the image some/bad\.png: it is corrupt"):
        read_image(tmp_path / "bad.png", "some/bad.png")


def test_an_absent_image_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the image x does not exist"):
        read_image(tmp_path / "bad.png", "x")


def test_open_files_are_read() -> None:
    assert read_image(io.BytesIO(good()), "x").size == (20, 20)
