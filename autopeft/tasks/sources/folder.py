"""Folders of images: one folder per class, as timm's ImageFolder reads them."""

from __future__ import annotations

import functools
import os
from pathlib import Path

from autopeft.errors import DataError
from autopeft.tasks.sources._images import EXTENSIONS, natural_key, read_image
from autopeft.tasks.sources.source import Part, Sample, Source

__all__ = ["has_images", "open_folder"]

_PARTS: dict[str, Part] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}


def open_folder(path: Path) -> Source:
    """Find the images below a folder.

    Either `train/` with `val/` (or `valid/`, `validation/`), `test/` or both, each holding a folder per class, or one
    tree with a folder per class. As in timm, folders are walked to any depth, a class is called by the innermost
    folder of its images, and classes and files are in natural order. Hidden folders and files are passed over.

    Raises:
        DataError: when there is no such folder, no image in class folders, an empty class folder, a single class, or
            a class that is missing in a part.
    """
    if not path.is_dir():
        what = "is a file, not a folder" if path.exists() else "does not exist"
        raise DataError(f"the data folder {path} {what}")
    named = {_PARTS[sub.name.lower()]: sub for sub in _folders(path) if sub.name.lower() in _PARTS}
    if "train" in named or (named and set(named.values()) == set(_folders(path))):
        _refuse_twins(path, named)
        roots: dict[Part, Path] = {part: named[part] for part in ("train", "val", "test") if part in named}
    else:
        _refuse_wrapper(path)
        roots = {"all": path}
    found = {part: _images(root) for part, root in roots.items()}
    for part, files in found.items():
        if not files:
            raise DataError(f"no images in class folders below {roots[part]} (looked for {_endings()})")
    classes = tuple(sorted({file.parent.name for files in found.values() for file in files}, key=natural_key))
    index = {name: label for label, name in enumerate(classes)}
    parts: dict[Part, tuple[Sample, ...]] = {
        part: tuple(
            Sample(
                file.relative_to(path).as_posix(),
                index[file.parent.name],
                functools.partial(read_image, file, str(file)),
            )
            for file in files
        )
        for part, files in found.items()
    }
    return Source(f"the data folder {path}", classes, parts)


def has_images(path: Path) -> bool:
    """Whether images lie in a folder directly, and none in folders of it."""
    files = any(f.suffix.lower() in EXTENSIONS for f in path.iterdir() if f.is_file() and not _hidden(f.name))
    return files and not _folders(path)


def _folders(path: Path) -> list[Path]:
    try:
        return sorted(sub for sub in path.iterdir() if sub.is_dir() and not _hidden(sub.name))
    except OSError as error:
        raise DataError(f"cannot list the data folder {path}: {error.strerror or error}") from error


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _images(root: Path) -> list[Path]:
    files = []
    for folder, subfolders, names in os.walk(root, followlinks=True):
        subfolders[:] = [name for name in subfolders if not _hidden(name)]
        images = [n for n in names if not _hidden(n) and os.path.splitext(n)[1].lower() in EXTENSIONS]
        if not images and not subfolders and Path(folder) != root:
            raise DataError(f"the class folder {folder} holds no images; remove it or add some ({_endings()})")
        if Path(folder) == root and images:
            raise DataError(
                f"{root} holds images directly, such as {min(images)}; put the images of each class into a folder"
            )
        files += [Path(folder, name) for name in images]
    return sorted(files, key=lambda file: natural_key(str(file)))


def _endings() -> str:
    return " ".join(sorted(EXTENSIONS))


def _refuse_twins(path: Path, named: dict[Part, Path]) -> None:
    """Refuse `val/` beside `valid/`: nobody would notice that one of them is not read."""
    for sub in _folders(path):
        part = _PARTS.get(sub.name.lower())
        if part is not None and named[part] != sub:
            raise DataError(f"{path} has two folders for its {part} part, {named[part].name} and {sub.name}; keep one")


def _refuse_wrapper(path: Path) -> None:
    """Refuse the folder above the right one: train and val would be walked as one tree and mixed."""
    inner = _folders(path)
    if len(inner) == 1 and any(_PARTS.get(sub.name.lower()) == "train" for sub in _folders(inner[0])):
        raise DataError(f"{path} holds nothing but {inner[0].name}, which has a train part; did you mean {inner[0]}?")
