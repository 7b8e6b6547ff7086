"""Study files to a `Study`, and a `Study` to plain data and YAML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic_core import PydanticCustomError

from autopeft.config import _yaml
from autopeft.config._part import explain, validate
from autopeft.config.merge import merge
from autopeft.config.override import override
from autopeft.config.plugin import Plugin, PluginTable, describe
from autopeft.config.registries import TASKS
from autopeft.config.study import Study
from autopeft.core import codec
from autopeft.errors import UsageError

__all__ = ["load_study", "study_from_dict", "study_from_yaml", "study_to_dict", "study_to_yaml"]


def load_study(files: Sequence[Path], values: Mapping[str, Any]) -> Study:
    """The study of several files, merged left to right, with single settings on top.

    Args:
        files: study files in YAML; none gives the defaults.
        values: dotted path to value, see `autopeft.config.override.override`; applied in their order.

    Raises:
        UsageError: naming the file, or the key and its place.
    """
    merged: dict[str, Any] = {}
    for file in files:
        merged = merge(merged, _read(file))
    if "task" in values:
        merged = merge(merged, {"task": values["task"]})
    return override(study_from_dict(merged), values)


def study_from_yaml(text: str, where: str = "study") -> Study:
    """The study of a YAML text.

    Args:
        text: one YAML document, a mapping; an empty one gives the defaults.
        where: what to call the text in messages: a file name.

    Raises:
        UsageError: naming the line, or the key and its place.
    """
    return study_from_dict(_mapping(_yaml.parse(text, where), where))


def study_from_dict(data: Mapping[str, Any]) -> Study:
    """The study of plain data, strictly: unknown keys and wrong types are errors.

    What it leaves out is as its task says, else as every study's.

    Raises:
        UnknownKey: for a key that nobody knows, with a guess.
        UnknownPlugin: for a plug-in that no registry holds, with a guess.
        UsageError: for a value of the wrong type or range. Every error names its place; where several things are wrong,
            each has a line.
    """
    try:
        study: Study = validate(Study, merge(_defaults(data.get("task")), data))
    except PydanticCustomError as error:
        raise explain(error, "study") from error
    return study


def study_to_dict(study: Study) -> dict[str, Any]:
    """Plain data that `study_from_dict` gives an equal study for, every setting included.

    Raises:
        UnknownPlugin: when a plug-in's class is not registered.
    """
    data: dict[str, Any] = {}
    for name in Study.names():
        value, marker = getattr(study, name), Study.marker(name)
        if isinstance(marker, Plugin):
            data[name] = describe(value, marker.room)
        elif isinstance(marker, PluginTable):
            data[name] = {key: describe(plugin, marker.room) for key, plugin in value.items()}
        else:
            data[name] = codec.encode(value)
            for key, inside in Study.plugins_in(name).items():
                data[name][key] = describe(getattr(value, key), inside.room)
    return data


def study_to_yaml(study: Study) -> str:
    """YAML that `study_from_yaml` gives an equal study for, every setting included."""
    return _yaml.render(study_to_dict(study))


def _defaults(task: Any) -> Mapping[str, Any]:
    """What a study of a task is unless it says otherwise; unknown tasks are reported when the study is checked."""
    kind = task.get("type") if isinstance(task, Mapping) else task
    if not isinstance(kind, str) or kind not in TASKS:
        return {}
    defaults: Mapping[str, Any] = getattr(TASKS[kind], "DEFAULTS", {})
    return defaults


def _read(file: Path) -> Mapping[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UsageError(f"there is no study file at {file}") from error
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text in UTF-8"
        raise UsageError(f"cannot read the study file {file}: {reason}") from error
    return _mapping(_yaml.parse(text, str(file)), str(file))


def _mapping(data: Any, where: str) -> Mapping[str, Any]:
    if data is None:
        return {}
    if not isinstance(data, Mapping):
        raise UsageError(f"{where}: a study is a mapping of keys to values, found {data!r}")
    return data
