"""Search spaces by name or path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic_core import PydanticCustomError

import autopeft
from autopeft.config import _yaml
from autopeft.config._guess import known_names
from autopeft.config._part import explain, validate
from autopeft.core.space import Knob, Space
from autopeft.errors import UsageError

__all__ = ["load_space", "space_names", "spaces_folder"]


def spaces_folder(package: Path | None = None) -> Path:
    """Where the named search spaces lie: inside the package in a wheel, beside it in a checkout.

    Args:
        package: folder of the package; this one's when None.

    Raises:
        UsageError: when the folder is at neither place.
    """
    package = package or Path(autopeft.__file__).parent
    for folder in (package / "_spaces", package.parent / "search_spaces"):
        if folder.is_dir():
            return folder
    raise UsageError(f"the search spaces are neither in {package / '_spaces'} nor beside the package; install it again")


def space_names() -> tuple[str, ...]:
    """The named search spaces, sorted."""
    return tuple(sorted(path.stem for path in spaces_folder().glob("*.yaml")))


def load_space(name: str) -> Space:
    """A search space: a mapping of dotted paths into the study to ranges.

    Args:
        name: name of a space (`mixed_methods`), or path of a YAML file.

    Raises:
        UsageError: when there is no such space, or the file is not one, naming the knob.
    """
    file = Path(name)
    if file.suffix not in (".yaml", ".yml") and "/" not in name:
        if name not in space_names():
            raise UsageError(f"no search space is called {name!r}. {known_names(name, space_names())}")
        file = spaces_folder() / f"{name}.yaml"
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text in UTF-8"
        raise UsageError(f"cannot read the search space {file}: {reason}") from error
    data = _yaml.parse(text, str(file))
    if not isinstance(data, dict) or not data:
        raise UsageError(f"{file}: a search space is a mapping of dotted paths to ranges")
    return Space(tuple(_knob(path, entry, str(file)) for path, entry in data.items()))


def _knob(path: str, entry: Any, where: str) -> Knob:
    if not isinstance(entry, dict) or "path" in entry:
        raise UsageError(f"{where}: knob {path!r} needs low and high, or choices, got {entry!r}")
    try:
        knob: Knob = validate(Knob, {"path": path, **entry})
    except PydanticCustomError as error:
        raise explain(error, f"{where}: {path}") from error
    return knob
