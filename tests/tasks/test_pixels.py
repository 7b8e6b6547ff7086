from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from autopeft.errors import DataError, StaleRun, UsageError
from autopeft.tasks._pixels import PixelStore, Preprocessing, pixel_hash
from autopeft.tasks.sources.source import Sample


def noise(seed: int, height: int = 13, width: int = 17) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


class Counting:
    """Samples that count how often they are decoded."""

    def __init__(self, n: int) -> None:
        self.calls = [0] * n
        self.lock = threading.Lock()
        self.samples = [Sample(f"s{i}", 0, lambda i=i: self.load(i)) for i in range(n)]  # type: ignore[misc]

    def load(self, i: int) -> Image.Image:
        with self.lock:
            self.calls[i] += 1
        return noise(i)


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_the_two_halves_are_timms_transform_bit_for_bit(config: dict[str, Any], mode: str, interpolation: str) -> None:
    config |= {"crop_mode": mode, "interpolation": interpolation, "crop_pct": 0.875, "input_size": (3, 9, 9)}
    ours = Preprocessing(config)
    theirs = create_transform(**config, is_training=False)
    for seed in range(3):
        image = noise(seed)
        assert torch.equal(ours.to_input(ours.to_bytes(image)[None])[0], theirs(image))


def test_one_channel_is_grey(config: dict[str, Any]) -> None:
    found = Preprocessing(config | {"input_size": (1, 13, 17), "crop_pct": 1.0})
    image = noise(0)
    pixels = found.to_bytes(image)
    assert np.array_equal(pixels[0].numpy(), np.asarray(image.convert("L")))
    # Statistics of three channels are averaged: mean (.485 + .456 + .406) / 3, std (.229 + .224 + .225) / 3.
    wanted = (pixels.double() / 255 - 1.347 / 3) / (0.678 / 3)
    torch.testing.assert_close(found.to_input(pixels[None])[0].double(), wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize("change", [{"input_size": (4, 8, 8)}, {"mean": (0.1, 0.2)}])
def test_unusable_configs_are_refused(config: dict[str, Any], change: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Preprocessing(config | change)


def test_an_incomplete_config_is_refused(config: dict[str, Any]) -> None:
    del config["crop_pct"]
    with pytest.raises(UsageError, match="crop_pct"):
        Preprocessing(config)


@pytest.mark.parametrize("threads", [1, 3])
def test_kept_images_are_decoded_once(config: dict[str, Any], threads: int) -> None:
    counting = Counting(10)
    store = PixelStore(Preprocessing(config), 10 * 3 * 8 * 8, threads)
    assert store.reserve([s.name for s in counting.samples])
    chunks = [counting.samples[i : i + 4] for i in range(0, 10, 4)]
    first = list(store.batches(chunks))
    assert store.hashes(counting.samples[:0]) == {}
    second = list(store.batches(chunks))
    assert counting.calls == [1] * 10
    assert [len(b) for b in first] == [4, 4, 2]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    wanted = Preprocessing(config).to_bytes(noise(5))
    assert torch.equal(first[1][1], wanted)


def test_hashing_fills_the_memory(config: dict[str, Any]) -> None:
    counting = Counting(4)
    store = PixelStore(Preprocessing(config), 10_000, 2)
    store.reserve([s.name for s in counting.samples])
    hashes = store.hashes(counting.samples)
    assert hashes == {f"s{i}": pixel_hash(noise(i)) for i in range(4)}
    list(store.batches([counting.samples]))
    assert counting.calls == [1] * 4


@pytest.mark.parametrize("threads", [1, 3])
def test_images_that_do_not_fit_are_decoded_again(config: dict[str, Any], threads: int) -> None:
    counting = Counting(6)
    store = PixelStore(Preprocessing(config), 6 * 3 * 8 * 8 - 1, threads)
    assert not store.reserve([s.name for s in counting.samples])
    assert store.reserve([s.name for s in counting.samples[:2]])
    chunks = [counting.samples[:3], counting.samples[3:]]
    first, second = list(store.batches(chunks)), list(store.batches(chunks))
    assert counting.calls == [1, 1, 2, 2, 2, 2]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_what_was_given_out_is_a_copy(config: dict[str, Any]) -> None:
    counting = Counting(2)
    store = PixelStore(Preprocessing(config), 10_000, 1)
    store.reserve(["s0", "s1"])
    (batch,) = store.batches([counting.samples])
    batch.zero_()
    (again,) = store.batches([counting.samples])
    assert bool(again.any())


@pytest.mark.parametrize("threads", [1, 2])
def test_changed_images_are_refused(config: dict[str, Any], threads: int) -> None:
    counting = Counting(3)
    store = PixelStore(Preprocessing(config), 0, threads)
    store.expect({"s0": pixel_hash(noise(0)), "s1": pixel_hash(noise(7))})
    with pytest.raises(StaleRun, match="the image s1 is not the one"):
        list(store.batches([counting.samples]))


def test_an_error_stops_the_queue(config: dict[str, Any]) -> None:
    counting = Counting(300)

    def fail() -> Image.Image:
        raise DataError("cannot read the image bad")

    store = PixelStore(Preprocessing(config), 0, 2)
    with pytest.raises(DataError, match="bad"):
        store.hashes([Sample("bad", 0, fail), *counting.samples])
    assert sum(counting.calls) < 300


def test_hashes_tell_sizes_apart() -> None:
    assert pixel_hash(Image.new("RGB", (2, 3))) != pixel_hash(Image.new("RGB", (3, 2)))
    assert len(pixel_hash(noise(0))) == 32
