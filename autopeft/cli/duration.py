"""Durations as a person writes them."""

from __future__ import annotations

import re

from autopeft.errors import UsageError

__all__ = ["seconds_of"]

_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}


def seconds_of(text: str | None) -> float | None:
    """Seconds of `90`, `150s`, `20m`, `2h` or `1h30m`; None of None.

    Raises:
        UsageError: when the text is no duration above 0.
    """
    if text is None:
        return None
    parts = re.findall(r"(\d+(?:\.\d+)?)([smh]?)", text.strip())
    if not parts or "".join(n + u for n, u in parts) != text.strip():
        raise UsageError(f"cannot read the duration {text!r}; write it as 150s, 20m, 2h or 1h30m")
    seconds = sum(float(number) * _UNITS[unit] for number, unit in parts)
    if seconds <= 0:
        raise UsageError(f"a time limit must be above 0, got {text!r}")
    return seconds
