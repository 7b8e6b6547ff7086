"""Single settings of a study by dotted path."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, get_args

from pydantic_core import PydanticCustomError

from autopeft.config import _yaml
from autopeft.config._guess import known_names
from autopeft.config._part import explain, fields_of, validate
from autopeft.config.plugin import Plugin, PluginTable
from autopeft.config.registries import ROOMS
from autopeft.config.study import Study
from autopeft.errors import UnknownKey, UsageError

__all__ = ["override", "parse_assignments"]

_UNSET = object()


def override(study: Study, values: Mapping[str, Any]) -> Study:
    """A new, re-checked study with some settings changed.

    Args:
        study: stays as it is.
        values: dotted path to plain value, such as `{"methods.lora.alpha": 8, "train.lr.core": 1e-2}`. A path may end
            at a whole part (`methods`, `scorer`), which is then replaced, before settings inside it are changed.
            Multipliers of `gain.methods`, `gain.roles` and arguments of `model.kwargs` may be new, and so may
            regularisers, and methods that are given as a whole: `{"methods.fact": {"form": "tk"}}`.

    Raises:
        UnknownKey: for a path that leads nowhere, with a guess.
        UsageError: for a value of the wrong type or range.
    """
    tree = _Node()
    for path, value in values.items():
        node = tree
        for part in path.split("."):
            node = node.children.setdefault(part, _Node())
        node.value, node.children = value, {}
    changed: Study = _changed(study, Study, tree, "study")
    return changed


def parse_assignments(texts: Sequence[str]) -> dict[str, Any]:
    """Dotted paths and values of `key.path=value` arguments; the last of one path counts.

    Values are read as YAML: `8`, `1e-3`, `true`, `null`, `[lora, core]`, anything else is text.

    Raises:
        UsageError: for an argument that is no assignment or whose value is no YAML.
    """
    values: dict[str, Any] = {}
    for text in texts:
        path, separator, value = text.partition("=")
        path = path.strip()
        if not separator or not path or not all(path.split(".")):
            raise UsageError(f"cannot read {text!r}; write a setting as KEY.PATH=VALUE, such as train.epochs=20")
        values.pop(path, None)
        values[path] = _yaml.parse(value, f"the value of {path}")
    return values


@dataclasses.dataclass(slots=True)
class _Node:
    """What changes at one key: its whole value, keys inside it, or both."""

    value: Any = _UNSET
    children: dict[str, _Node] = dataclasses.field(default_factory=dict)


def _changed(current: Any, hint: Any, node: _Node, where: str) -> Any:
    if node.value is not _UNSET:
        current = _decoded(hint, node.value, where)
    if "type" in node.children and any(isinstance(mark, Plugin) for mark in getattr(hint, "__metadata__", ())):
        # Another type leaves nothing of the plug-in's settings.
        current = _decoded(hint, {"type": node.children.pop("type").value}, where)
    if not node.children:
        return current
    if dataclasses.is_dataclass(current) and not isinstance(current, type):
        return _changed_fields(current, node, where)
    if isinstance(current, Mapping):
        return _changed_items(current, hint, node, where)
    key = next(iter(node.children))
    raise UnknownKey(f"{where} is a single value and has no key {key!r}")


def _changed_fields(current: Any, node: _Node, where: str) -> Any:
    hints = fields_of(type(current))
    changes = {}
    for key, child in node.children.items():
        if key not in hints:
            raise UnknownKey(f"{where} has no key {key!r}. {known_names(key, hints)}")
        changes[key] = _changed(getattr(current, key), hints[key], child, f"{where}.{key}")
    try:
        return dataclasses.replace(current, **changes)
    except UsageError as error:
        raise type(error)(_placed(str(error), where)) from error


def _changed_items(current: Mapping[str, Any], hint: Any, node: _Node, where: str) -> dict[str, Any]:
    table = next((mark for mark in getattr(hint, "__metadata__", ()) if isinstance(mark, PluginTable)), None)
    inner = Annotated[Any, Plugin(table.room)] if table else get_args(hint)[1] if get_args(hint) else Any
    items = dict(current)
    for key, child in node.children.items():
        if table and key not in items:
            items.update(_added(table, hint, key, child, items, where))
        if table and child.value is not _UNSET:
            # A table knows what a name stands for; a single plug-in does not.
            items[key] = _decoded(hint, {key: child.value}, where)[key]
            child = _Node(_UNSET, child.children)
        items[key] = _changed(items.get(key, {}), inner, child, f"{where}.{key}")
    return items


def _added(
    table: PluginTable, hint: Any, key: str, node: _Node, items: Mapping[str, Any], where: str
) -> Mapping[str, Any]:
    """The plug-in that is put into a table because something of it is set; the setting itself is left to the caller."""
    if node.value is not _UNSET:
        return {}
    if not table.grows:
        raise UnknownKey(f"{where} has no key {key!r}. {known_names(key, items)}")
    known = ROOMS[table.room]
    settings = {"type": node.children.pop("type").value} if "type" in node.children else None
    if settings is None and key not in known:
        raise UnknownKey(f"{where} has no key {key!r}. {known_names(key, dict.fromkeys((*items, *known)))}")
    added: Mapping[str, Any] = _decoded(hint, {key: settings}, where)
    return added


def _decoded(hint: Any, value: Any, where: str) -> Any:
    try:
        return validate(hint, value)
    except PydanticCustomError as error:
        raise explain(error, where) from error


def _placed(message: str, where: str) -> str:
    inner = where.partition(".")[2]
    return message if not inner or message.startswith(f"{inner.rpartition('.')[2]}.") else f"{where}: {message}"
