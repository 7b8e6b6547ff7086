from __future__ import annotations

import collections
import decimal
import fractions
import sys
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any

import pytest

from autopeft.core import registry as module
from autopeft.core.registry import Registry
from autopeft.errors import UnknownPlugin, UsageError

TABLE = {"ordered": "collections:OrderedDict", "fraction": "fractions:Fraction"}


def registry(builtin: dict[str, str] | None = None) -> Registry[Any]:
    return Registry("thing", "autopeft.things", TABLE if builtin is None else builtin)


def publish(monkeypatch: pytest.MonkeyPatch, **points: str) -> None:
    found = EntryPoints(EntryPoint(name, value, "autopeft.things") for name, value in points.items())
    monkeypatch.setattr(module, "entry_points", lambda group: found if group == "autopeft.things" else EntryPoints())


def test_names_lead_to_classes_and_back() -> None:
    things = registry()
    assert things["fraction"] is fractions.Fraction
    assert things.name_of(collections.OrderedDict) == "ordered"
    assert list(things) == ["fraction", "ordered"]
    assert "fraction" in things
    assert "colour" not in things


def test_nothing_is_imported_before_it_is_asked_for() -> None:
    things = registry({"lazy": "this:s"})
    assert "lazy" in things
    assert list(things) == ["lazy"]
    assert "this" not in sys.modules


def test_an_unknown_name_is_guessed_at() -> None:
    with pytest.raises(
        UnknownPlugin, match=r"no thing is called 'fractoin'\. Did you mean 'fraction'\? Known: fraction, ordered\."
    ):
        registry()["fractoin"]
    with pytest.raises(UnknownPlugin, match=r"'zzz'\. Known: fraction, ordered\."):
        registry()["zzz"]


def test_other_packages_register_by_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    publish(monkeypatch, counter="collections:Counter")
    things = registry()
    assert things["counter"] is collections.Counter
    assert list(things) == ["counter", "fraction", "ordered"]
    assert things.name_of(collections.Counter) == "counter"


def test_two_packages_with_one_name_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    publish(monkeypatch, fraction="decimal:Decimal")
    with pytest.raises(
        UsageError, match="two packages call a thing 'fraction': fractions:Fraction and decimal:Decimal"
    ):
        list(registry())


def test_the_same_class_under_the_same_name_is_no_conflict(monkeypatch: pytest.MonkeyPatch) -> None:
    publish(monkeypatch, fraction="fractions:Fraction")
    assert registry()["fraction"] is fractions.Fraction


@pytest.mark.parametrize("target", ["no_such_module:Thing", "fractions:NoSuchThing"])
def test_a_plugin_that_cannot_be_loaded_is_named(target: str) -> None:
    with pytest.raises(UnknownPlugin, match=f"the thing 'broken' cannot be loaded from {target}: "):
        registry({"broken": target})["broken"]


def test_a_class_that_nobody_registered_is_named_by_its_path() -> None:
    things = registry()
    assert things["py:decimal:Decimal"] is decimal.Decimal
    assert things.name_of(decimal.Decimal) == "py:decimal:Decimal"
    assert "py:decimal:Decimal" not in list(things)
    # One that is registered keeps its own name.
    assert things["py:fractions:Fraction"] is fractions.Fraction
    assert things.name_of(fractions.Fraction) == "fraction"
    for broken in ("py:decimal", "py:decimal:", "py::Decimal", "py:no_such_module:Thing"):
        with pytest.raises(UnknownPlugin, match=f"the thing '{broken}' cannot be loaded from"):
            things[broken]


def test_a_class_in_the_folder_that_one_works_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "thing_of_a_test.py").write_text("class Mine:\n    pass\n")
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    assert registry()["py:thing_of_a_test:Mine"].__name__ == "Mine"
    assert sys.path == path


def test_a_class_of_this_process_can_be_added() -> None:
    class Mine:
        pass

    things = registry()
    things.add("mine", Mine)
    assert things["mine"] is Mine
    assert things.name_of(Mine) == "mine"
    assert "mine" not in registry()
    with pytest.raises(UsageError, match="'mine' exists already"):
        things.add("mine", Mine)
    with pytest.raises(UsageError, match="'fraction' exists already"):
        things.add("fraction", Mine)


def test_a_class_that_is_not_registered_has_no_name() -> None:
    with pytest.raises(UnknownPlugin, match="builtins:int is not a registered thing"):
        registry().name_of(int)
