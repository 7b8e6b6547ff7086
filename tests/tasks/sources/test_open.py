from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from autopeft.errors import DataError, UsageError
from autopeft.tasks.sources.open import open_source


@pytest.mark.parametrize(
    ("spec", "guess"),
    [
        ("digts", "digits"),
        ("Digits", "digits"),
        ("tourch/cifar10", "torch/NAME"),
        ("hfd/x", "hfds/NAME"),
        ("cvs:x", "csv:FILE"),
    ],
)
def test_unknown_forms_are_guessed(spec: str, guess: str) -> None:
    with pytest.raises(UsageError, match=rf"did you mean '{guess}'\? Give a folder, digits"):
        open_source(spec)


@pytest.mark.parametrize("spec", ["", "flowers", "s3://bucket/x", "masks:x"])
def test_unknown_forms_list_what_there_is(spec: str) -> None:
    with pytest.raises(UsageError, match="give a folder, digits, torch/NAME, hfds/NAME, csv:FILE"):
        open_source(spec)


@pytest.mark.parametrize("spec", ["./flowers", "/no/flowers", "~/no-such/flowers", "data/flowers"])
def test_what_looks_like_a_path_is_a_missing_folder(spec: str) -> None:
    with pytest.raises(DataError, match=f"the data folder {spec} does not exist"):
        open_source(spec)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("")
    with pytest.raises(UsageError, match=r"is a file; .*did you mean csv:.*x\.csv"):
        open_source(str(tmp_path / "x.csv"))


def test_a_folder_wins_over_a_name(tree: Callable[[dict[str, int]], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    root = tree({"digits/a": 1, "digits/b": 1})
    monkeypatch.chdir(root)
    assert open_source("digits").classes == ("a", "b")
