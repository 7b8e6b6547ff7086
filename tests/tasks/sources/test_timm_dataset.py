from __future__ import annotations

import importlib.util
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autopeft.errors import DataError, MissingDependency, UnknownKey, UsageError
from autopeft.tasks.sources.open import open_source


def write_mnist(root: Path, name: str, n_train: int, n_test: int) -> np.ndarray[Any, Any]:
    """Files as MNIST has them: big-endian headers, images and labels as bytes; label i of sample i is i % 10."""
    raw = root / name / "raw"
    raw.mkdir(parents=True)
    images = np.random.default_rng(0).integers(0, 256, (n_train + n_test, 28, 28), dtype=np.uint8)
    for prefix, part in (("train", images[:n_train]), ("t10k", images[n_train:])):
        header = struct.pack(">IIII", 2051, len(part), 28, 28)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(header + part.tobytes())
        labels = bytes(i % 10 for i in range(len(part)))
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, len(part)) + labels)
    return images


def test_torch_names_are_opened_from_their_root(tmp_path: Path) -> None:
    images = write_mnist(tmp_path, "FashionMNIST", 20, 10)
    source = open_source(f"torch/fashion_mnist?root={tmp_path}")
    assert source.classes[:2] == ("T-shirt/top", "Trouser")
    assert {part: len(s) for part, s in source.parts.items()} == {"train": 20, "test": 10}
    sample = source.parts["test"][3]
    assert (sample.name, sample.label) == ("test/3", 3)
    assert np.array_equal(np.asarray(sample.load())[..., 0], images[23])


def test_the_default_root_is_in_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_mnist(tmp_path, "MNIST", 10, 10)
    monkeypatch.setenv("AUTOPEFT_DATA", str(tmp_path))
    assert len(open_source("torch/mnist").classes) == 10


def test_absent_data_is_not_fetched_unasked(tmp_path: Path) -> None:
    root = tmp_path / "none"
    with pytest.raises(DataError, match=r"cannot open the data set torch/cifar10: .*data\.download=true"):
        open_source(f"torch/cifar10?root={root}")
    assert not root.exists()


def test_unknown_torch_names_are_guessed() -> None:
    with pytest.raises(UsageError, match=r"'torch/cifar11'. Did you mean 'cifar10'\?"):
        open_source("torch/cifar11")
    with pytest.raises(UnknownKey, match=r"'rot'.*Did you mean 'root'"):
        open_source("torch/cifar10?rot=x")


def test_hfds_without_its_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "datasets" else find(name))
    with pytest.raises(MissingDependency, match=r"pip install 'autopeft\[hf-datasets\]'"):
        open_source("hfds/user/name")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_hfds_opens_local_folders(tree: Callable[[dict[str, int]], Path], tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    root = tree({f"{part}/{c}": 3 for part in ("train", "validation") for c in ("cat", "dog")})
    source = open_source(f"hfds/{root}?root={tmp_path / 'cache'}")
    assert source.classes == ("cat", "dog")
    assert {part: len(s) for part, s in source.parts.items()} == {"train": 6, "val": 6}
    assert source.parts["train"][0].load().size == (12, 10)
    with pytest.raises(DataError, match="labels"):
        open_source(f"hfds/{root}?root={tmp_path / 'cache'}&label=labels")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_hfds_is_not_fetched_unasked(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    with pytest.raises(DataError, match=r"cannot open the data set hfds/user/no-such-name: .*data\.download=true"):
        open_source(f"hfds/user/no-such-name?root={tmp_path}")
