from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from autopeft.errors import StoreError
from autopeft.store.paths import RunFolder


def test_the_names_of_a_run(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    names = {
        "study": "study.yaml",
        "environment": "environment.json",
        "splits": "splits.json",
        "catalog": "catalog.json",
        "scores": "scores",
        "graph": "graph.json",
        "plans": "plans",
        "trials": "trials",
        "database": "study.db",
        "artifacts": "artifacts",
        "leaderboard": "leaderboard.csv",
        "report_md": "report.md",
        "report_html": "report.html",
        "record": "record.json",
        "exports": "exports",
        "finish": "finish",
        "compressed": "compressed",
        "costs": "costs.json",
        "lock": "run.lock",
    }
    assert {name: getattr(run, name).relative_to(run.root).as_posix() for name in names} == names
    properties = {name for name, value in vars(RunFolder).items() if isinstance(value, property)}
    assert properties == set(names), "every name is listed here"


def test_what_belongs_to_a_trial() -> None:
    run = RunFolder(Path("run"))
    assert run.plan(7) == Path("run/plans/0007.json")
    assert run.trial(12345) == Path("run/trials/12345")
    assert run.outcome(7) == Path("run/trials/0007/outcome.json")
    assert run.log(7) == Path("run/trials/0007/log.txt")
    assert run.checkpoint(7) == Path("run/trials/0007/checkpoint")
    with pytest.raises(ValueError, match="at least 0, got -1"):
        run.trial(-1)


def test_text_will_do_for_a_path() -> None:
    assert RunFolder("runs/a") == RunFolder(Path("runs/a"))  # type: ignore[arg-type]
    assert str(RunFolder(Path("runs/a"))) == "runs/a"


def test_making_it_twice_keeps_what_is_there(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "a" / "b").create()
    run.study.write_text("seed: 0\n")
    assert run.create() == run
    assert os.listdir(run.root) == ["study.yaml"]
    assert run.require() == run


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(StoreError, match="is a file; choose another --output"):
        RunFolder(tmp_path / "run").create()
    with pytest.raises(StoreError, match="cannot be written to"):
        RunFolder(tmp_path / "run" / "inside").create()
    assert (tmp_path / "run").read_text() == "mine"


def test_a_folder_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mkdir = Path.mkdir

    def refuse(self: Path, *args: Any, **kwargs: Any) -> None:
        if self.name == "deepest":
            raise PermissionError(errno.EACCES, "Permission denied")
        mkdir(self, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(StoreError, match=r"deepest cannot be written to: Permission denied$"):
        RunFolder(tmp_path / "a" / "b" / "deepest").create()
    assert os.listdir(tmp_path) == [], "the folders above it are gone again"


def test_an_existing_folder_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder(tmp_path / "run").create()

    def refuse(*_: object) -> int:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(StoreError, match=r"run cannot be written to: Read-only file system$"):
        run.create()
    assert run.root.is_dir(), "a folder that was there stays"


def test_a_path_that_holds_no_run(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no run folder at"):
        RunFolder(tmp_path / "none").require()
    with pytest.raises(StoreError, match=r"not a run folder: it has no study\.yaml"):
        RunFolder(tmp_path).require()
