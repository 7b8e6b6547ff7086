"""The end of a message about an unknown name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["known_names"]


def known_names(name: str, known: Iterable[str]) -> str:
    """`Did you mean 'x'? Known: x, y.`, or the known names alone when none is near."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1)
    guess = f"Did you mean {near[0]!r}? " if near else ""
    return f"{guess}Known: {', '.join(names) or 'none'}."
