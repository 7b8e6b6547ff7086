"""What an option costs and what may be spent."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, Literal, get_args

from autopeft.errors import UsageError

__all__ = ["Budget", "Cost", "Unit"]

Unit = Literal["trainable", "entries", "stored", "bytes"]
"""`trainable` parameters, `entries` changed in the weights, numbers `stored` in the exported adapter file (values,
positions, scales, bytes of packed codes), or `bytes` that the plan adds to that file (KB = 1000 bytes)."""

_HEADER_BYTES = 96
"""Upper bound of what one tensor adds to the header of the exported file: 46 characters, a name of up to 7 (names are
short there), type, shape and two positions of up to 36 in files below 100 MB, and up to 7 bytes of padding."""

_NOUNS: dict[str, str] = {
    "trainable": "trainable parameters",
    "entries": "changed entries",
    "stored": "stored numbers",
    "bytes": "bytes",
}

_NUMBER = re.compile(r"^\s*([0-9]+(?:\.[0-9]+)?|\.[0-9]+)\s*([a-zA-Z%]*)\s*$")
_SCALES: dict[str, tuple[int, Unit]] = {
    "": (1, "trainable"),
    "k": (1_000, "trainable"),
    "m": (1_000_000, "trainable"),
    "b": (1, "bytes"),
    "kb": (1_000, "bytes"),
    "mb": (1_000_000, "bytes"),
    "entries": (1, "entries"),
    "stored": (1, "stored"),
}


@dataclass(frozen=True, slots=True)
class Cost:
    """The exact price of an option.

    Attributes:
        trainable: scalars that receive gradients.
        stored: numbers that the exported file holds (values, positions, scales, bytes of packed codes).
        bits: their size in bits.
        entries: entries of the model's tensors that the option changes.
        tensors: number of tensors that hold them (each adds to the file's header).
    """

    trainable: int
    stored: int
    bits: int
    entries: int
    tensors: int = 1

    def __post_init__(self) -> None:
        for name in ("trainable", "stored", "bits", "entries", "tensors"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"{name} of a cost must be an integer of at least 0, got {value!r}")

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.trainable + other.trainable,
            self.stored + other.stored,
            self.bits + other.bits,
            self.entries + other.entries,
            self.tensors + other.tensors,
        )

    @classmethod
    def plain(cls, trainable: int, entries: int, tensors: int = 1) -> Cost:
        """A cost whose every trained scalar is stored as a 32-bit float and nothing else is."""
        return cls(trainable, trainable, 32 * trainable, entries, tensors)

    @classmethod
    def zero(cls) -> Cost:
        """The price of nothing."""
        return cls(0, 0, 0, 0, 0)

    def of(self, unit: Unit) -> int:
        """The component that a budget in `unit` is spent in."""
        if unit == "trainable":
            return self.trainable
        if unit == "entries":
            return self.entries
        if unit == "stored":
            return self.stored
        return -(-self.bits // 8) + _HEADER_BYTES * self.tensors


@dataclass(frozen=True, slots=True)
class Budget:
    """A hard integer limit.

    Attributes:
        limit: how many of `unit` may be spent; at least 0.
        unit: what is counted.
        share_of: the number of base parameters that the limit is a share of, when it was given as a share.
        text: the budget as it was written.
    """

    limit: int
    unit: Unit = "trainable"
    share_of: int | None = None
    text: str = ""

    SCHEMA: ClassVar[str] = "autopeft.budget/1"

    def __post_init__(self) -> None:
        if not isinstance(self.limit, int) or isinstance(self.limit, bool) or self.limit < 0:
            raise UsageError(f"a budget must be a whole number of at least 0, got {self.limit!r}")
        if self.unit not in get_args(Unit):
            raise UsageError(f"a budget is counted in {', '.join(get_args(Unit))}; got {self.unit!r}")

    def __str__(self) -> str:
        share = f" ({self.text})" if self.text and self.share_of else ""
        return f"{self.limit:,} {_NOUNS[self.unit]}{share}"

    @classmethod
    def share(cls, fraction: Fraction | float | str, of: int) -> Budget:
        """A share of `of` base parameters, rounded down: 0.1 % of ViT-B/16's 85,798,656 is 85,798."""
        exact = Fraction(str(fraction))
        if exact < 0:
            raise UsageError(f"a budget cannot be negative, got {fraction}")
        return cls(int(exact * of), "trainable", of, f"{float(exact * 100):g}%")

    @classmethod
    def parse(cls, text: str, n_base: int) -> Budget:
        """Read `0.1%`, `86k`, `1.2M`, `1198`, `500KB`, `2000entries` or `2000stored`.

        Args:
            text: the budget as a person writes it. A bare number counts trainable parameters.
            n_base: unique base parameters without the classifier, which a percentage is a share of.

        Raises:
            UsageError: when the text is not a budget, or is zero or negative.
        """
        match = _NUMBER.match(text)
        examples = "write it as 0.1%, 86k, 1.2M, 1198, 500KB or like:lora-r8"
        if match is None:
            raise UsageError(f"cannot read the budget {text!r}; {examples}")
        number, suffix = Fraction(match[1]), match[2].lower()
        if number == 0:
            raise UsageError(f"a budget of {text!r} buys nothing; give at least 1 parameter ({examples})")
        if suffix == "%":
            budget = cls(int(number * n_base / 100), "trainable", n_base, text.strip())
            if budget.limit < 1:
                raise UsageError(f"a budget of {text!r} is less than 1 of the {n_base:,} base parameters; {examples}")
            return budget
        if suffix not in _SCALES:
            raise UsageError(f"cannot read the unit {match[2]!r} of the budget {text!r}; {examples}")
        scale, unit = _SCALES[suffix]
        if number * scale < 1:
            raise UsageError(f"a budget of {text!r} is less than 1 {unit.rstrip('s')}; {examples}")
        return cls(int(number * scale), unit, None, text.strip())
