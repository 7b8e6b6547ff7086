"""What the pipeline says while it works; the command line decides how to show it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["Emit", "Event", "Kind", "silent"]

Kind = Literal["stage", "progress", "result", "warning"]


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened.

    Attributes:
        kind: `stage` (a new stage begins), `progress` (`done` of `total`), `result` (something finished), `warning`.
        text: one line for a person.
        done: units of work done, for progress.
        total: units of work in all, 0 when unknown.
        data: the same for programs.
    """

    kind: Kind
    text: str
    done: float = 0.0
    total: float = 0.0
    data: Mapping[str, Any] = field(default_factory=dict)


Emit = Callable[[Event], None]


def silent(event: Event) -> None:
    """Say nothing."""
