"""`path?key=value&key=value`, as data specifications carry settings."""

from __future__ import annotations

from collections.abc import Collection
from urllib.parse import parse_qsl

from autopeft.errors import UnknownKey, UsageError
from autopeft.tasks._guess import known_names

__all__ = ["split_query"]


def split_query(spec: str, known: Collection[str]) -> tuple[str, dict[str, str]]:
    """Path and settings of a data specification.

    Raises:
        UnknownKey: for a setting that is not known.
        UsageError: for a setting without a value, or given twice.
    """
    path, _, query = spec.partition("?")
    settings: dict[str, str] = {}
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True) if query else []
    except ValueError as error:
        raise UsageError(
            f"cannot read {query!r} in the data specification {spec!r}; write key=value&key=value"
        ) from error
    for key, value in pairs:
        if key not in known:
            raise UnknownKey(f"unknown setting {key!r} in the data specification {spec!r}. {known_names(key, known)}")
        if not value or key in settings:
            what = "is given twice" if value else "has no value"
            raise UsageError(f"the setting {key!r} of the data specification {spec!r} {what}")
        settings[key] = value
    return path, settings
