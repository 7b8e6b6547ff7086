"""What the outer loop may vary: named knobs with ranges."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from autopeft.errors import UnknownKey, UsageError

__all__ = ["Knob", "Space", "Value"]

Value = float | int | str


@dataclass(frozen=True, slots=True)
class Knob:
    """One dotted path into the study and the values it may take.

    Exactly one of a numeric range (`low`, `high`) and `choices` is given.

    Attributes:
        path: dotted path into the study, such as `gain.exponent` or `train.lr.core`.
        low: smallest value.
        high: largest value.
        log: whether the scale is logarithmic.
        choices: the values, for a categorical knob.
        default: the value of the unsearched plan.
    """

    path: str
    low: float | None = None
    high: float | None = None
    log: bool = False
    choices: tuple[Value, ...] = ()
    default: Value | None = None

    def __post_init__(self) -> None:
        numeric = self.low is not None and self.high is not None
        ranged = self.low is not None or self.high is not None
        if numeric == bool(self.choices) or (ranged and not numeric):
            raise UsageError(f"knob {self.path!r} needs either low and high, or choices")
        if numeric:
            assert self.low is not None
            assert self.high is not None
            if not (math.isfinite(self.low) and math.isfinite(self.high)) or self.low > self.high:
                raise UsageError(f"knob {self.path!r} needs low <= high, got low={self.low}, high={self.high}")
            if self.log and self.low <= 0:
                raise UsageError(f"knob {self.path!r} is logarithmic and needs low > 0, got {self.low}")
        if self.default is not None and not self.holds(self.default):
            raise UsageError(f"the default {self.default!r} of knob {self.path!r} is outside of its range")

    def holds(self, value: Value) -> bool:
        """Whether the knob may take this value."""
        if self.choices:
            return value in self.choices
        assert self.low is not None
        assert self.high is not None
        return isinstance(value, int | float) and not isinstance(value, bool) and self.low <= value <= self.high


@dataclass(frozen=True, slots=True)
class Space:
    """The knobs of a search, in the order of their file."""

    knobs: tuple[Knob, ...]

    def __post_init__(self) -> None:
        paths = [knob.path for knob in self.knobs]
        if len(set(paths)) != len(paths):
            raise UsageError(f"a search space names a knob twice: {', '.join(sorted(paths))}")

    def __iter__(self) -> Iterator[Knob]:
        return iter(self.knobs)

    def __len__(self) -> int:
        return len(self.knobs)

    @property
    def defaults(self) -> dict[str, Value]:
        """The knobs that have a default, with it."""
        return {knob.path: knob.default for knob in self.knobs if knob.default is not None}

    def check(self, values: Mapping[str, Value]) -> None:
        """Refuse values outside of the space.

        Raises:
            UnknownKey: for a knob that the space does not have.
            UsageError: for a value outside of its knob's range.
        """
        knobs = {knob.path: knob for knob in self.knobs}
        for path, value in values.items():
            if path not in knobs:
                raise UnknownKey(f"the search space has no knob {path!r}; it has {', '.join(knobs) or 'none'}")
            if not knobs[path].holds(value):
                raise UsageError(f"{value!r} is outside of knob {path!r}")
