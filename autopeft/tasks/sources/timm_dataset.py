"""Data sets that timm opens by name: torchvision's (`torch/...`) and the Hugging Face hub's (`hfds/...`)."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from autopeft.errors import DataError, MissingDependency, UsageError
from autopeft.tasks._guess import known_names
from autopeft.tasks.sources._images import natural_key, read_image, to_rgb
from autopeft.tasks.sources._query import split_query
from autopeft.tasks.sources.source import Part, Sample, Source

__all__ = ["open_hfds", "open_torch"]

_log = logging.getLogger("autopeft.tasks")

_TORCH = ("cifar10", "cifar100", "fashion_mnist", "kmnist", "mnist")
_HFDS_PARTS: dict[str, Part] = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


def open_torch(spec: str, download: bool) -> Source:
    """Open `torch/cifar10?root=FOLDER`.

    Without `root` the data lies in `$AUTOPEFT_DATA`, or `~/.cache/autopeft/data` when that is not set.

    Args:
        spec: the data specification.
        download: whether absent data may be fetched.

    Raises:
        UsageError: for a name that is not one of torchvision's small sets.
        DataError: when the data is absent and may not be fetched, or cannot be read.
    """
    from timm.data import create_dataset

    where, settings = split_query(spec, ("root",))
    name = where.partition("/")[2].lower()
    if name not in _TORCH:
        raise UsageError(f"no data set is called {where!r}. {known_names(name, _TORCH)} Others: give their folder")
    root = _root(settings)
    parts: dict[Part, tuple[Sample, ...]] = {}
    classes: tuple[str, ...] = ()
    for part in ("train", "test"):
        split = "train" if part == "train" else "validation"
        try:
            if download:
                root.mkdir(parents=True, exist_ok=True)
            data = create_dataset(f"torch/{name}", root=str(root), split=split, download=download)
        except (RuntimeError, OSError) as error:
            advice = (
                "check the connection"
                if download
                else f"fetch it with data.download=true, or give ?root= ({root} was tried)"
            )
            raise DataError(f"cannot open the data set {where}: {_line(error)}; {advice}") from error
        classes = tuple(str(c) for c in data.classes)
        parts["train" if part == "train" else "test"] = tuple(
            Sample(f"{part}/{i}", int(label), functools.partial(_load_torch, data, i, f"{where} {part}/{i}"))
            for i, label in enumerate(data.targets)
        )
    return Source(f"the data set {where}", classes, parts)


def open_hfds(spec: str, download: bool) -> Source:
    """Open `hfds/USER/NAME?image=image&label=label&root=FOLDER`; a local folder works as `hfds//PATH` too.

    Splits called `train`, `val`, `valid`, `validation` and `test` are used. `root` is the cache folder.

    Args:
        spec: the data specification.
        download: whether the hub may be asked for absent data.

    Raises:
        MissingDependency: without the package `datasets`.
        DataError: when the data is absent and may not be fetched, or lacks a column or a train split.
    """
    if importlib.util.find_spec("datasets") is None:
        raise MissingDependency("datasets", "hf-datasets", "open data sets of the Hugging Face hub (hfds/...)")
    import datasets
    from timm.data import create_dataset

    where, settings = split_query(spec, ("root", "image", "label"))
    image, label = settings.get("image", "image"), settings.get("label", "label")
    name, cache = where.partition("/")[2], settings.get("root")
    readers: dict[Part, Any] = {}
    with _offline(not download):
        try:
            for split in datasets.get_dataset_split_names(name):
                part = _HFDS_PARTS.get(split)
                if part is not None:
                    data = create_dataset(f"hfds/{name}", root=cache, split=split, input_key=image, target_key=label)
                    readers[part] = data.reader
        except Exception as error:
            # The hub's client raises dozens of classes of its own, for names, columns, connections and formats.
            advice = "check name and connection" if download else "fetch it with data.download=true, and check the name"
            raise DataError(f"cannot open the data set {where}: {_line(error)}; {advice}") from error
    if "train" not in readers:
        raise DataError(f"the data set {where} has no train split; used are splits called {', '.join(_HFDS_PARTS)}")
    columns = readers["train"].dataset.column_names
    if label not in columns:
        raise DataError(
            f"the data set {where} has no column {label!r}; name it as ?label=. {known_names(label, columns)}"
        )
    found = {part: list(reader.dataset[label]) for part, reader in readers.items()}
    classes, index = _hfds_classes(readers["train"].class_to_idx, [v for values in found.values() for v in values])
    parts: dict[Part, tuple[Sample, ...]] = {}
    for part, values in found.items():
        odd = [value for value in values if value not in index]
        if part != "train" and len(odd) == len(values):
            _log.warning("the %s part of %s carries no labels (%r) and is left out", part, where, odd[0])
            continue
        if odd:
            raise DataError(
                f"the {part} part of the data set {where} has {len(odd)} labels of no class, such as {odd[0]!r}"
            )
        parts[part] = tuple(
            Sample(f"{part}/{i}", index[value], functools.partial(_load_hfds, readers[part], i, f"{where} {part}/{i}"))
            for i, value in enumerate(values)
        )
    return Source(f"the data set {where}", classes, parts)


def _hfds_classes(class_to_idx: dict[str, int], values: list[Any]) -> tuple[tuple[str, ...], dict[Any, int]]:
    """Class names, and the label of every value that occurs; values may be class numbers or plain texts."""
    if class_to_idx:
        ordered = sorted(class_to_idx, key=class_to_idx.__getitem__)
        return tuple(ordered), {class_to_idx[name]: i for i, name in enumerate(ordered)}
    kinds = sorted(set(values), key=lambda v: natural_key(str(v)))
    return tuple(str(kind) for kind in kinds), {kind: i for i, kind in enumerate(kinds)}


def _load_torch(data: Any, index: int, name: str) -> Image.Image:
    try:
        image: Image.Image = data[index][0]
        return to_rgb(image)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read image {name}: {error}") from error


def _load_hfds(reader: Any, index: int, name: str) -> Image.Image:
    # Through the reader: timm's ImageDataset would put the next image in place of a corrupt one.
    with contextlib.closing(reader[index][0]) as file:
        return read_image(file, name)


def _root(settings: dict[str, str]) -> Path:
    fallback = os.environ.get("AUTOPEFT_DATA") or "~/.cache/autopeft/data"
    return Path(settings.get("root", fallback)).expanduser()


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


@contextlib.contextmanager
def _offline(wanted: bool) -> Iterator[None]:
    """Keep the hub's clients off the network; their own switch is only read when they are imported."""
    import datasets.config
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    try:
        if wanted:
            constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before
