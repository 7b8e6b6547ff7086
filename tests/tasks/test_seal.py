from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from autopeft.errors import StoreError
from autopeft.tasks._seal import MARKER, Seal


def test_it_opens_once_and_writes_a_marker(tmp_path: Path) -> None:
    seal = Seal(tmp_path / "run")
    with pytest.raises(StoreError, match="sealed"):
        seal.check()
    seal.open()
    seal.check()
    assert [p.name for p in (tmp_path / "run").iterdir()] == [MARKER]
    with pytest.raises(StoreError, match="opened before"):
        seal.open()


def test_another_seal_on_the_folder_stays_shut(tmp_path: Path) -> None:
    Seal(tmp_path).open()
    other = Seal(tmp_path)
    with pytest.raises(StoreError, match="opened before"):
        other.open()
    with pytest.raises(StoreError, match="sealed"):
        other.check()


def test_another_process_is_refused(tmp_path: Path) -> None:
    Seal(tmp_path, "a").open()
    code = (
        "import sys; from pathlib import Path; from autopeft.errors import StoreError\n"
        "from autopeft.tasks._seal import Seal\n"
        "try: Seal(Path(sys.argv[1]), sys.argv[2]).open()\n"
        "except StoreError: sys.exit(6)\n"
    )
    run = [sys.executable, "-c", code, str(tmp_path)]
    assert subprocess.run([*run, "b"], check=False).returncode == 6
    assert subprocess.run([*run, "a"], check=False).returncode == 0


def test_a_token_opens_again_and_no_other_does(tmp_path: Path) -> None:
    Seal(tmp_path, "mine").open()
    again = Seal(tmp_path, "mine")
    again.open()
    again.open()
    again.check()
    for token in (None, "theirs", ""):
        with pytest.raises(StoreError, match="opened before"):
            Seal(tmp_path, token).open()


def test_a_marker_without_a_token_opens_for_nobody(tmp_path: Path) -> None:
    Seal(tmp_path).open()
    with pytest.raises(StoreError):
        Seal(tmp_path, "mine").open()
    with pytest.raises(StoreError):
        Seal(tmp_path, None).open()


@pytest.mark.parametrize("content", ["", "[]", "{}", "not json"])
def test_a_damaged_marker_still_seals(tmp_path: Path, content: str) -> None:
    (tmp_path / MARKER).write_text(content)
    with pytest.raises(StoreError, match="opened before"):
        Seal(tmp_path, "mine").open()


def test_a_file_system_without_links_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    Seal(tmp_path, "mine").open()
    assert json.loads((tmp_path / MARKER).read_text())["token"] == "mine"
    assert [p.name for p in tmp_path.iterdir()] == [MARKER]
    with pytest.raises(StoreError, match="opened before"):
        Seal(tmp_path).open()


def test_a_folder_that_cannot_be_written_to_stays_shut(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    seal = Seal(tmp_path / "file" / "run")
    with pytest.raises(StoreError, match="cannot write"):
        seal.open()
    assert not seal.is_open


def test_without_a_folder_the_object_remembers() -> None:
    seal = Seal(None)
    seal.open()
    with pytest.raises(StoreError, match="opens once"):
        seal.open()
    Seal(None).open()
