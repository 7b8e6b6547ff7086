"""One trial that a searcher asks for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from autopeft.core.space import Value

__all__ = ["Suggested"]


@dataclass(frozen=True, slots=True)
class Suggested:
    """A trial to run.

    Attributes:
        number: its number in the study.
        values: every knob with its value.
        origin: number of the trial whose process died and that this one stands in for; its own number otherwise. A
            checkpoint of the origin can be continued.
        attempt: how often it has been begun, this time included.
    """

    number: int
    values: Mapping[str, Value]
    origin: int
    attempt: int = 1
