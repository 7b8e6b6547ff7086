from __future__ import annotations

import math
from typing import Any

import pytest

from autopeft.core.space import Knob, Space
from autopeft.errors import UnknownKey, UsageError

SPACE = Space(
    (
        Knob("gain.exponent", 0.2, 1.0, default=0.5),
        Knob("train.lr.core", 1e-3, 1e-1, log=True),
        Knob("train.amp", choices=("off", "bf16"), default="off"),
    )
)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "either low and high, or choices"),
        ({"low": 0.0}, "either low and high, or choices"),
        ({"low": 0.0, "high": 1.0, "choices": (1,)}, "either low and high, or choices"),
        ({"low": 0.0, "choices": (1,)}, "either low and high, or choices"),
        ({"low": 1.0, "high": 0.0}, "low <= high"),
        ({"low": 0.0, "high": math.inf}, "low <= high"),
        ({"low": math.nan, "high": 1.0}, "low <= high"),
        ({"low": 0.0, "high": 1.0, "log": True}, "low > 0"),
        ({"low": 0.0, "high": 1.0, "default": 1.5}, "outside of its range"),
        ({"choices": ("a", "b"), "default": "c"}, "outside of its range"),
    ],
)
def test_a_knob_is_checked(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Knob("x.y", **values)


@pytest.mark.parametrize(
    ("index", "value", "held"),
    [
        (0, 0.2, True),
        (0, 1, True),
        (0, 1.0000001, False),
        (0, True, False),
        (0, math.nan, False),
        (0, "0.5", False),
        (2, "off", True),
        (2, "on", False),
    ],
)
def test_the_range_of_a_knob_includes_its_ends(index: int, value: Any, held: bool) -> None:
    assert SPACE.knobs[index].holds(value) is held


def test_a_space_keeps_its_order_and_its_defaults() -> None:
    assert [knob.path for knob in SPACE] == ["gain.exponent", "train.lr.core", "train.amp"]
    assert len(SPACE) == 3
    assert SPACE.defaults == {"gain.exponent": 0.5, "train.amp": "off"}


def test_values_outside_of_the_space_are_refused() -> None:
    SPACE.check({"gain.exponent": 0.3, "train.amp": "bf16"})
    with pytest.raises(UnknownKey, match=r"no knob 'gain\.exponents'; it has gain\.exponent, "):
        SPACE.check({"gain.exponents": 0.3})
    with pytest.raises(UsageError, match=r"2\.0 is outside of knob 'gain\.exponent'"):
        SPACE.check({"gain.exponent": 2.0})


def test_a_knob_is_named_once() -> None:
    with pytest.raises(UsageError, match="twice"):
        Space((Knob("a", 0, 1), Knob("a", 0, 2)))
