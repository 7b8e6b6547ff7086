"""Folders of images with captions, as diffusers reads them: `metadata.jsonl` beside the files."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from autopeft.errors import DataError
from autopeft.tasks.sources._images import EXTENSIONS, natural_key, read_image
from autopeft.tasks.sources.source import Part, Sample, Source

__all__ = ["METADATA", "Captioned", "open_captions", "open_unlabelled"]

METADATA = "metadata.jsonl"
_PARTS: tuple[tuple[str, Part], ...] = (("train", "train"), ("val", "val"), ("validation", "val"), ("test", "test"))
_KEYS = ("file_name", "text", "mask", "prior", "label")


@dataclass(frozen=True, slots=True)
class Captioned:
    """Images and what is known about them beside a class.

    Attributes:
        source: the images.
        texts: name of a sample to its caption; samples without one are left out.
        masks: name of a sample to the file of its mask: white counts fully in the loss, black least.
        priors: names of samples that keep the model what it was (DreamBooth's prior images).
    """

    source: Source
    texts: Mapping[str, str]
    masks: Mapping[str, Path]
    priors: frozenset[str] = frozenset()

    def mask(self, name: str) -> Image.Image | None:
        """The mask of a sample in RGB; None when it has none.

        Raises:
            DataError: when its file cannot be read.
        """
        path = self.masks.get(name)
        return None if path is None else read_image(path, str(path))


def open_captions(path: Path) -> Captioned:
    """Read `metadata.jsonl` of a folder, or of its `train/`, `val/` (or `validation/`) and `test/`.

    Each line is an object with `file_name` (relative to the file), and perhaps `text` (the caption), `label` (a
    class), `mask` (a file) and `prior` (true for images of the class that are not of the subject).

    Raises:
        DataError: naming the line, for lines that are no such objects, images that are absent, or labels that some
            images have and others lack.
    """
    roots: dict[Part, Path] = {}
    if (path / METADATA).is_file():
        roots["all"] = path
    else:
        for folder, part in _PARTS:
            if (path / folder / METADATA).is_file():
                roots.setdefault(part, path / folder)
    if not roots:
        raise DataError(f"there is no {METADATA} in {path}, nor in its train/")
    rows = {part: list(_rows(root)) for part, root in roots.items()}
    labelled = {"label" in row for found in rows.values() for row in found}
    if len(labelled) == 2:
        raise DataError(f"some lines of the {METADATA} in {path} have a label and some have none; give all or none one")
    kinds = sorted({str(r["label"]) for found in rows.values() for r in found if "label" in r}, key=natural_key)
    classes = tuple(kinds) or ("all",)
    index = {name: i for i, name in enumerate(classes)}
    texts, masks, priors = {}, {}, set()
    parts: dict[Part, tuple[Sample, ...]] = {}
    for part, found in rows.items():
        samples = []
        for row in found:
            file = roots[part] / row["file_name"]
            name = file.relative_to(path).as_posix()
            label = index[str(row["label"])] if "label" in row else 0
            samples.append(Sample(name, label, functools.partial(read_image, file, str(file))))
            if row.get("text") is not None:
                texts[name] = str(row["text"])
            if row.get("mask"):
                masks[name] = roots[part] / str(row["mask"])
            if row.get("prior"):
                priors.add(name)
        parts[part] = tuple(samples)
    source = Source(f"the captioned folder {path}", classes, parts, unlabelled=len(classes) < 2)
    return Captioned(source, texts, masks, frozenset(priors))


def open_unlabelled(path: Path) -> Source:
    """Images that lie in a folder directly: one class, called `all`.

    Raises:
        DataError: when there are none.
    """
    files = sorted((f for f in path.iterdir() if f.suffix.lower() in EXTENSIONS), key=lambda f: natural_key(f.name))
    samples = tuple(Sample(f.name, 0, functools.partial(read_image, f, str(f))) for f in files)
    return Source(f"the data folder {path}", ("all",), {"all": samples}, unlabelled=True)


def _rows(root: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    seen: set[str] = set()
    for number, line in enumerate((root / METADATA).read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        where = f"line {number} of {root / METADATA}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{where} is no JSON: {error}") from error
        if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
            raise DataError(f"{where} has no file_name; each line is an object with {', '.join(_KEYS)}")
        if row["file_name"] in seen:
            raise DataError(f"{where} names {row['file_name']} a second time")
        if not (root / row["file_name"]).is_file():
            raise DataError(f"{where} names the image {row['file_name']}, which does not exist")
        seen.add(row["file_name"])
        found.append(row)
    return found
