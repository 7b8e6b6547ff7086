"""One metric of an outcome, or a message that says which there are."""

from __future__ import annotations

import difflib
from typing import Literal, get_args

from autopeft.core.outcome import Outcome
from autopeft.errors import UnknownKey, UsageError

__all__ = ["Direction", "check_direction", "pick"]

Direction = Literal["maximize", "minimize"]


def check_direction(direction: str) -> None:
    """Refuse a direction that is neither.

    Raises:
        UsageError: with what there is.
    """
    if direction not in get_args(Direction):
        raise UsageError(f"direction must be one of {', '.join(get_args(Direction))}, got {direction!r}")


def pick(outcome: Outcome, name: str) -> float:
    """The value of a metric.

    Raises:
        UnknownKey: when the outcome has no metric of this name, with a guess.
        UsageError: when the outcome is not done.
    """
    if outcome.status != "done":
        raise UsageError(f"only an outcome that is done has rewards, this one is {outcome.status}: {outcome.reason}")
    if name not in outcome.metrics:
        known = sorted(outcome.metrics)
        near = difflib.get_close_matches(name, known, n=1)
        guess = f"Did you mean {near[0]!r}? " if near else ""
        raise UnknownKey(f"no metric is called {name!r}. {guess}Measured: {', '.join(known)}.")
    return float(outcome.metrics[name])
