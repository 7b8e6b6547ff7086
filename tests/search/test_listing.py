from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import optuna
import pytest

from autopeft.core.goals import Goals
from autopeft.core.outcome import Outcome
from autopeft.errors import StoreError, UsageError
from autopeft.search.listing import list_studies, read_payload
from autopeft.search.optuna_study import OptunaSearcher
from autopeft.store.paths import RunFolder
from autopeft.store.storage import default_url

Open = Callable[..., OptunaSearcher]


def test_rows(open_: Open, url: str) -> None:
    searcher = open_()
    for value in (0.25, 0.5):
        searcher.tell(searcher.ask().number, Outcome("done", {"top1": value}), (value,))
    searcher.tell(searcher.ask().number, Outcome("failed", reason="r"))
    assert list_studies(url) == [{"name": "study", "best": 0.5, "trials": {"complete": 2, "fail": 1}}]


def test_the_best_of_a_minimised_study_is_the_smallest(open_: Open, url: str) -> None:
    searcher = open_(goals=Goals(("top1",), ("minimize",)))
    assert list_studies(url)[0]["best"] is None
    for value in (0.25, 0.5):
        searcher.tell(searcher.ask().number, Outcome("done", {"top1": value}), (value,))
    assert list_studies(url)[0]["best"] == 0.25


def test_a_run_folder(open_: Open, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run").create()
    run.study.write_text("")
    open_(url=default_url(run.database))
    assert [row["name"] for row in list_studies(str(run))] == ["study"]
    with pytest.raises(StoreError, match="no run folder"):
        list_studies(str(tmp_path / "nothing"))


def test_payload(open_: Open, url: str) -> None:
    open_(payload={"epochs": 9, "lr": [1e-3]})
    assert read_payload(url) == ("study", {"epochs": 9, "lr": [1e-3]})
    assert read_payload(url, "study")[0] == "study"
    open_(payload={"epochs": 7})  # the first one stays
    assert read_payload(url)[1]["epochs"] == 9


def test_payload_of_nothing(open_: Open, url: str, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="there is no storage"):
        read_payload(f"sqlite:///{tmp_path / 'none.db'}")
    assert not (tmp_path / "none.db").exists()
    open_()
    with pytest.raises(StoreError, match="not made by autopeft search"):
        read_payload(url)
    with pytest.raises(StoreError, match=r"no study 'other' .* it has study"):
        read_payload(url, "other")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    optuna.create_study(storage=url, study_name="second")
    with pytest.raises(UsageError, match="2 studies; name one with --study: second, study"):
        read_payload(url)
