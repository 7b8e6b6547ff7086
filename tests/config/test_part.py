from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import pytest
from pydantic_core import PydanticCustomError

from autopeft.config._part import explain, fields_of, validate
from autopeft.config.plugin import Plugin
from autopeft.core.contracts import Method, Scorer
from autopeft.errors import UnknownKey, UsageError


@dataclass(frozen=True, slots=True)
class Inner:
    x: float
    n: int = 1

    def __post_init__(self) -> None:
        if self.x < 0:
            raise UsageError(f"x must not be negative, got {self.x}")
        if self.n == 13:
            raise ValueError("thirteen")


@dataclass(frozen=True, slots=True)
class Outer:
    inner: Inner = field(default_factory=lambda: Inner(1.0))
    flag: bool = False
    name: str = ""
    mode: Literal["a", "b"] = "a"
    maybe: int | None = None
    either: float | Literal["auto"] = "auto"
    either_or_none: int | str | None = None
    pair: tuple[int, float] = (1, 2.0)
    inners: tuple[Inner, ...] = ()
    table: Mapping[str, Inner] = field(default_factory=dict)
    anything: Any = None
    kind: ClassVar[str] = "outer"


def read(data: Any) -> Outer:
    try:
        value: Outer = validate(Outer, data)
    except PydanticCustomError as error:
        raise explain(error, "top") from error
    return value


def test_everything_that_fits_is_read() -> None:
    data = {
        "inner": {"x": 2},
        "flag": True,
        "name": "n",
        "mode": "b",
        "maybe": 3,
        "either": 0.5,
        "either_or_none": "text",
        "pair": [1, 2],
        "inners": [{"x": 1.0, "n": 2}],
        "table": {"k": {"x": 0.0}},
        "anything": {"a": [1]},
    }
    expected = Outer(
        Inner(2.0), True, "n", "b", 3, 0.5, "text", (1, 2.0), (Inner(1.0, 2),), {"k": Inner(0.0)}, {"a": [1]}
    )
    found = read(data)
    assert found == expected
    assert type(found.inner.x) is float
    assert type(found.pair[1]) is float
    assert read({}) == Outer()
    assert read({"maybe": None, "either": "auto", "either_or_none": None}) == Outer()


@pytest.mark.parametrize(
    ("data", "kind", "message"),
    [
        ({"flga": True}, UnknownKey, r"^top has no key 'flga'\. Did you mean 'flag'\? Known: inner, flag, name"),
        ({"kind": "x"}, UnknownKey, "^top has no key 'kind'"),
        ({"inner": {"x": 1, "z": 1}}, UnknownKey, r"^top\.inner has no key 'z'\. Known: x, n\.$"),
        ({"inner": {"n": 1}}, UsageError, r"^top\.inner: the key 'x' is missing$"),
        ({"inner": 3}, UsageError, r"^top\.inner: expected a mapping with keys among x, n, got 3$"),
        ({"inner": {"x": -1}}, UsageError, r"^top\.inner: x must not be negative, got -1\.0$"),
        ({"inner": {"x": 1, "n": 13}}, UsageError, r"^top\.inner: ValueError: thirteen$"),
        ({"inner": {"x": True}}, UsageError, r"^top\.inner\.x: expected a number, got True$"),
        ({"inner": {"x": "1"}}, UsageError, r"^top\.inner\.x: expected a number, got '1'$"),
        ({"inner": {"x": 1, "n": True}}, UsageError, r"^top\.inner\.n: expected a whole number, got True$"),
        ({"inner": {"x": 1, "n": 1.0}}, UsageError, r"^top\.inner\.n: expected a whole number, got 1\.0$"),
        ({"flag": 1}, UsageError, r"^top\.flag: expected true or false, got 1$"),
        ({"flag": "no"}, UsageError, r"^top\.flag: expected true or false, got 'no'$"),
        ({"name": 5}, UsageError, r"^top\.name: expected text, got 5$"),
        ({"name": None}, UsageError, r"^top\.name: expected text, got None$"),
        ({"mode": "c"}, UsageError, r"^top\.mode: expected 'a' or 'b', got 'c'$"),
        ({"maybe": 1.5}, UsageError, r"^top\.maybe: expected a whole number, got 1\.5$"),
        ({"either": "none"}, UsageError, r"^top\.either: expected a number or 'auto', got 'none'$"),
        ({"either_or_none": 1.5}, UsageError, r"^top\.either_or_none: expected a whole number or text, got 1\.5$"),
        ({"pair": [1]}, UsageError, r"^top\.pair: expected a longer list, got \[1\]$"),
        ({"pair": [1, 2, 3]}, UsageError, r"^top\.pair: .*at most 2 items"),
        ({"pair": 1}, UsageError, r"^top\.pair: expected a list, got 1$"),
        ({"inners": [{"x": 1}, {"x": 1, "y": 2}]}, UnknownKey, r"^top\.inners\.1 has no key 'y'"),
        ({"table": [1]}, UsageError, r"^top\.table: expected a mapping of keys to values, got \[1\]$"),
        ({"table": {"k": {"x": "y"}}}, UsageError, r"^top\.table\.k\.x: expected a number"),
    ],
)
def test_what_does_not_fit_is_named_with_its_place(data: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        read(data)
    assert type(caught.value) is kind


def test_every_fault_has_a_line() -> None:
    with pytest.raises(UsageError) as caught:
        read({"flag": 1, "name": 2, "inner": {"x": "3"}})
    assert len(str(caught.value).splitlines()) == 3


def test_fields_that_the_program_sets_are_no_settings() -> None:
    @dataclass(frozen=True)
    class Wired:
        power: float = 1.0
        methods: Mapping[str, Method] = field(default_factory=dict)
        scorer: Scorer | None = None
        hidden: int = field(default=0, repr=False)
        derived: int = field(default=0, init=False)
        inner: Annotated[Scorer | None, Plugin("scoring")] = None

    globals()["Wired"] = Wired
    assert list(fields_of(Wired)) == ["power", "inner"]
