from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autopeft.core.budget import Budget, Cost
from autopeft.core.codec import decode, encode
from autopeft.core.menu import Indices
from autopeft.core.outcome import Outcome
from autopeft.core.scores import ScoreOrigin
from autopeft.core.site import Catalog, Place, Site
from autopeft.core.space import Knob, Space
from autopeft.errors import CorruptFile


@dataclass(frozen=True)
class Inner:
    x: float
    flag: bool = False


@dataclass(frozen=True)
class Outer:
    name: str
    parts: tuple[Inner, ...] = ()
    pair: tuple[int, float] | None = None
    table: Mapping[str, Inner] | None = None
    mode: Literal["a", "b"] = "a"
    anything: Any = None
    number: float | int | str = 0

    SCHEMA: ClassVar[str] = "test.outer/1"


text = st.text(max_size=8)
inners = st.builds(Inner, st.floats(allow_nan=False), st.booleans())
outers = st.builds(
    Outer,
    text,
    st.lists(inners, max_size=3).map(tuple),
    st.none() | st.tuples(st.integers(), st.floats(allow_nan=False)),
    st.none() | st.dictionaries(text, inners, max_size=3),
    st.sampled_from(["a", "b"]),
    st.none() | st.booleans() | st.integers() | text | st.lists(st.integers(), max_size=2),
    st.floats(allow_nan=False, allow_infinity=False) | st.integers() | text,
)


@given(outers)
def test_values_survive_json(value: Outer) -> None:
    back = decode(Outer, json.loads(json.dumps(encode(value), allow_nan=False)))
    assert back == value
    assert type(back.number) is type(value.number)


@given(
    st.builds(
        Cost,
        st.integers(0, 10**9),
        st.integers(0, 10**9),
        st.integers(0, 10**9),
        st.integers(0, 10**9),
        st.integers(0, 9),
    ),
    st.builds(Budget, st.integers(0, 10**12), st.sampled_from(["trainable", "entries", "bytes"]), st.none(), text),
)
def test_costs_and_budgets_survive_json(cost: Cost, budget: Budget) -> None:
    assert decode(Cost, json.loads(json.dumps(encode(cost)))) == cost
    assert decode(Budget, json.loads(json.dumps(encode(budget)))) == budget


def test_a_catalogue_survives_json(catalog: Catalog) -> None:
    back = decode(Catalog, json.loads(json.dumps(encode(catalog))))
    assert back == catalog
    assert back.fingerprint == catalog.fingerprint


@pytest.mark.parametrize(
    "value",
    [
        Place("fc", "weight"),
        Outcome("done", {"top1": 1}, ((1, 0.5),), 3),
        ScoreOrigin("fisher", 64, "cat"),
        Space((Knob("a", 0.0, 1.0), Knob("b", choices=("x", 3, 0.5)))),
    ],
)
def test_other_values_survive_json(value: Any) -> None:
    assert decode(type(value), json.loads(json.dumps(encode(value)))) == value


def test_the_schema_comes_first_and_infinity_is_text() -> None:
    assert next(iter(encode(Outer("x")))) == "schema"
    assert encode(float("-inf")) == "-inf"
    assert decode(Inner, {"x": "-inf"}).x == float("-inf")


def test_indices_are_written_as_their_digest() -> None:
    indices = Indices(np.array([4, 8]))
    assert encode(indices) == {"sha256": indices.sha256, "n": 2}


def test_what_json_has_no_word_for_is_refused() -> None:
    with pytest.raises(TypeError, match="cannot write a set"):
        encode({"a": {1}})
    with pytest.raises(TypeError, match="cannot write a type"):
        encode(Inner)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], r"file: expected an object, found \[\]"),
        ({}, "file: the key 'name' is missing"),
        ({"name": "x", "nam": 1}, "file: unknown key 'nam'; known: name, parts"),
        ({"name": 1}, r"file\.name: expected str, found 1"),
        ({"name": "x", "parts": 3}, r"file\.parts: expected a list"),
        ({"name": "x", "parts": [{"x": "1"}]}, r"file\.parts\[0\]\.x: expected float, found '1'"),
        ({"name": "x", "parts": [{"x": True}]}, r"file\.parts\[0\]\.x: expected float, found True"),
        ({"name": "x", "parts": [{"x": 1, "flag": 1}]}, r"\.flag: expected bool, found 1"),
        ({"name": "x", "pair": [1]}, r"file\.pair: expected 2 values, found 1"),
        ({"name": "x", "pair": [1.5, 1]}, r"file\.pair\[0\]: expected int, found 1\.5"),
        ({"name": "x", "table": [1]}, r"file\.table: expected an object"),
        ({"name": "x", "table": {"k": {"y": 1}}}, r"file\.table\.k: unknown key 'y'"),
        ({"name": "x", "mode": "c"}, r"file\.mode: expected one of \('a', 'b'\), found 'c'"),
        ({"schema": "test.outer/2", "name": "x"}, r"written in format 'test\.outer/2', this version reads"),
    ],
)
def test_what_does_not_fit_is_named_with_its_place(data: Any, message: str) -> None:
    with pytest.raises(CorruptFile, match=message):
        decode(Outer, data, "file")


def test_a_value_that_its_class_refuses_is_a_corrupt_file() -> None:
    with pytest.raises(CorruptFile, match="cost: bits of a cost must be"):
        decode(Cost, {"trainable": 1, "stored": 1, "bits": -8, "entries": 1}, "cost")
    with pytest.raises(CorruptFile, match="budget: a budget must be a whole number of at least 0"):
        decode(Budget, {"limit": -1}, "budget")
    with pytest.raises(CorruptFile, match=r"site: every dimension"):
        decode(
            Site,
            encode(Site("a", "a", "linear", (1,), False, 0, "", ())) | {"shape": [0]},
            "site",
        )
