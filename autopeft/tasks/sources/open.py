"""A data specification to a source."""

from __future__ import annotations

import difflib
from pathlib import Path

from autopeft.errors import DataError, UsageError
from autopeft.tasks.sources.source import Source

__all__ = ["open_source"]

_FORMS = "a folder, digits, torch/NAME, hfds/NAME, csv:FILE"


def open_source(spec: str, download: bool = False) -> Source:
    """Find the labelled images that a data specification means; none is read yet.

    Args:
        spec: a folder, `digits`, `torch/...`, `hfds/...` or `csv:...`. An existing folder wins over a name.
        download: whether absent data may be fetched.

    Raises:
        UsageError: for a specification of no known form.
        DataError: when the data is absent or unusable.
    """
    # Imported late: `digits` needs neither torchvision's data sets nor the hub's client.
    if spec.startswith("csv:"):
        from autopeft.tasks.sources.csv_file import open_csv

        return open_csv(spec.removeprefix("csv:"))
    path = Path(spec).expanduser() if spec else None
    if path is not None and path.is_dir():
        from autopeft.tasks.sources.folder import open_folder

        return open_folder(path)
    prefix = spec.partition("/")[0].lower()
    if spec == "digits":
        from autopeft.tasks.sources.digits import open_digits

        return open_digits()
    if prefix == "torch" and "/" in spec:
        from autopeft.tasks.sources.timm_dataset import open_torch

        return open_torch(spec, download)
    if prefix == "hfds" and "/" in spec:
        from autopeft.tasks.sources.timm_dataset import open_hfds

        return open_hfds(spec, download)
    if path is not None and path.is_file():
        hint = f"; did you mean csv:{spec}?" if path.suffix.lower() == ".csv" else ""
        raise UsageError(f"the data {spec!r} is a file; give {_FORMS}{hint}")
    near = difflib.get_close_matches(prefix.partition(":")[0], ["digits", "torch", "hfds", "csv"], n=1)
    if near:
        form = {"digits": "digits", "torch": "torch/NAME", "hfds": "hfds/NAME", "csv": "csv:FILE"}[near[0]]
        raise UsageError(f"unknown data {spec!r}; did you mean {form!r}? Give {_FORMS}")
    if path is not None and (spec.startswith((".", "~", "/")) or "/" in spec or "\\" in spec) and ":" not in spec:
        raise DataError(f"the data folder {spec} does not exist")
    raise UsageError(f"unknown data {spec!r}, and there is no folder of that name; give {_FORMS}")
