"""A table of image paths and labels."""

from __future__ import annotations

import csv
import functools
from pathlib import Path

from autopeft.errors import DataError
from autopeft.tasks._guess import known_names
from autopeft.tasks.sources._images import natural_key, read_image
from autopeft.tasks.sources._query import split_query
from autopeft.tasks.sources.source import Part, Sample, Source

__all__ = ["open_csv"]

_PARTS: dict[str, Part] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}


def open_csv(spec: str) -> Source:
    """Read `labels.csv?image=path&label=y&split=split`.

    The file is comma-separated UTF-8 with a header line. `image` (by default the column `image`) holds paths relative
    to the file's folder, `label` (`label`) the class names; `split` names a column of `train`, `val` and `test`.
    Without it, and without a column called `split`, the table is one tree. Classes are in natural order.

    Raises:
        DataError: naming file and line, for a missing file or column, an empty or unknown cell, an image listed twice.
        UnknownKey: for a setting other than these three.
    """
    where, columns = split_query(spec, ("image", "label", "split"))
    path = Path(where).expanduser()
    rows, header = _read(path)
    image, label = columns.get("image", "image"), columns.get("label", "label")
    split = columns.get("split") or ("split" if "split" in header else None)
    for name in (image, label, *([split] if split else [])):
        if name not in header:
            raise DataError(f"{path} has no column {name!r}. {known_names(name, header)}")
    classes = tuple(sorted({row[label] for row in rows}, key=natural_key))
    index = {name: i for i, name in enumerate(classes)}
    parts: dict[Part, list[Sample]] = {}
    lines: dict[str, int] = {}
    for line, row in enumerate(rows, start=2):
        name = row[image]
        for column in (image, label):
            if not row[column]:
                raise DataError(f"{path}, row {line}: the column {column!r} is empty")
        if name in lines:
            raise DataError(f"{path}, row {line}: the image {name} was listed in row {lines[name]} already")
        lines[name] = line
        part: Part = "all"
        if split is not None:
            word = row[split].lower()
            if word not in _PARTS:
                raise DataError(f"{path}, row {line}: unknown split {row[split]!r}. {known_names(word, _PARTS)}")
            part = _PARTS[word]
        file = path.parent / name
        parts.setdefault(part, []).append(
            Sample(name, index[row[label]], functools.partial(read_image, file, f"{file} ({path.name}, row {line})"))
        )
    ordered: tuple[Part, ...] = ("all", "train", "val", "test")
    return Source(f"the table {path}", classes, {part: tuple(parts[part]) for part in ordered if part in parts})


def _read(path: Path) -> tuple[list[dict[str, str]], list[str]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = [name.strip() for name in next(reader, [])]
            rows = []
            for number, cells in enumerate((c for c in reader if c), start=2):
                if len(cells) != len(header):
                    raise DataError(f"{path}, row {number}: {len(cells)} cells, the header has {len(header)}")
                rows.append(dict(zip(header, (cell.strip() for cell in cells), strict=True)))
    except OSError as error:
        raise DataError(f"cannot read the table {path}: {error.strerror or error}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is not a comma-separated table in UTF-8: {error}") from error
    if not rows:
        raise DataError(f"the table {path} has no rows below its header line")
    return rows, header
