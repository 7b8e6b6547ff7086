"""Several study files to one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autopeft.config.plugin import Plugin, PluginTable
from autopeft.config.study import Study

__all__ = ["merge"]


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of `base` with those of `over` on top; neither is changed.

    Mappings merge key by key, everything else is replaced. A plug-in of another type replaces the whole plug-in, its
    settings included. A list of methods chooses: those stay, with the settings that `base` has for them.

    Args:
        base: plain data of a study file.
        over: plain data of a later one.
    """
    merged = dict(base)
    for key, value in over.items():
        marker = Study.marker(key) if key in Study.names() else None
        if key not in merged:
            merged[key] = value
        elif isinstance(marker, Plugin):
            merged[key] = _plugin(merged[key], value)
        elif isinstance(marker, PluginTable):
            merged[key] = _table(merged[key], value)
        else:
            merged[key] = _deep(merged[key], value)
    return merged


def _deep(base: Any, over: Any) -> Any:
    if not isinstance(base, Mapping) or not isinstance(over, Mapping):
        return over
    if "type" in over and over["type"] != base.get("type"):
        return over  # Another plug-in inside of a part, such as the sampler of `search`.
    merged = dict(base)
    for key, value in over.items():
        merged[key] = _deep(merged[key], value) if key in merged else value
    return merged


def _plugin(base: Any, over: Any) -> Any:
    base, over = ({"type": x} if isinstance(x, str) else {} if x is None else x for x in (base, over))
    if not isinstance(base, Mapping) or not isinstance(over, Mapping):
        return over
    same = over.get("type", base.get("type")) == base.get("type")
    return _deep(base, over) if same else over


def _table(base: Any, over: Any) -> Any:
    known = dict.fromkeys(base) if isinstance(base, list) else base
    if isinstance(over, list):
        return {name: known.get(name) for name in over} if _is_choice(over) and isinstance(known, Mapping) else over
    if not isinstance(known, Mapping) or not isinstance(over, Mapping):
        return over
    merged = dict(known)
    for name, value in over.items():
        merged[name] = _plugin(known[name], value) if name in known else value
    return merged


def _is_choice(names: list[Any]) -> bool:
    # What is wrong with any other list is for the decoder to say.
    return all(isinstance(name, str) for name in names) and len(set(names)) == len(names)
