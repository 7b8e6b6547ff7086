from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autopeft.config._yaml import parse, render
from autopeft.errors import UsageError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1.E+2", 100.0),
        (".5", 0.5),
        ("-3", -3),
        ("010", 10),
        ("0x10", 16),
        ("0o17", 15),
        ("1_000", "1_000"),
        ("12:30", "12:30"),
        ("2026-01-02", "2026-01-02"),
        ("no", "no"),
        ("off", "off"),
        ("Yes", "Yes"),
        ("true", True),
        ("False", False),
        ("~", None),
        ("", None),
        ("null", None),
        (".inf", math.inf),
        ("-.inf", -math.inf),
        ("0.1%", "0.1%"),
        ("1.2.3", "1.2.3"),
        ("e5", "e5"),
        ("'1e-4'", "1e-4"),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text: str, value: Any) -> None:
    found = parse(text, "text")
    assert found == value
    assert type(found) is type(value)


def test_keys_are_names() -> None:
    assert parse("{no: 1, 1: 2, null: 3, 1e3: 4}", "text") == {"no": 1, "1": 2, "null": 3, "1e3": 4}


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8")),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(plain)
def test_what_is_rendered_parses_to_the_same(data: Any) -> None:
    back = parse(render(data), "text")
    assert back == data
    assert repr(back) == repr(data), "and of the same types"


@pytest.mark.parametrize("text", ["1e-4", "no", "true", "0x10", "~", "12:30", "010", "", "- a", "a: b", "1.", ".5"])
def test_text_that_looks_like_something_else_stays_text(text: str) -> None:
    assert parse(render({"key": text}), "text") == {"key": text}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", r"file\.yaml, line 3, column 1: the key 'a' stands twice"),
        ("a: {b: 1, b: 2}", r"line 1, column 11: the key 'b' stands twice"),
        ("a: [1, 2", r"file\.yaml, line 1, column 9: expected ',' or ']'"),
        ("? [a]\n: 1", "a key must be text"),
        ("a: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("a: 1\n\tb: 2", "line 2, column 1"),
        ("a\0b", r"file\.yaml: "),
    ],
)
def test_what_is_no_yaml_is_named_with_its_place(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse(text, "file.yaml")
