from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from autopeft.errors import MissingDependency, StoreError, UsageError
from autopeft.store.storage import default_url, masked_url, open_storage

OPEN = "import sys; from autopeft.store.storage import open_storage; open_storage(sys.argv[1])"


def without_drivers(monkeypatch: pytest.MonkeyPatch, *absent: str) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in absent else find(name, *rest))


@pytest.mark.parametrize("name", ["run", "a b", "per%cent%20", "{braces}", "what?", "hash#tag", "späße"])
def test_a_run_folder_of_any_name_has_its_database_in_it(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    url = default_url(folder / "study.db")
    storage = open_storage(url)
    storage.engine.dispose()
    assert [path.name for path in folder.iterdir()] == ["study.db"]
    assert [path.name for path in tmp_path.iterdir()] == [name]
    open_storage(url, create=False).engine.dispose()


def test_opening_the_module_imports_no_optuna() -> None:
    code = "import sys, autopeft.store.storage; sys.exit(bool({'optuna', 'sqlalchemy'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_reading_a_study_that_does_not_exist_makes_no_file(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"no storage at .*study\.db"):
        open_storage(default_url(tmp_path / "study.db"), create=False)
    with pytest.raises(StoreError, match=r"the folder of the storage .*none/study\.db does not exist"):
        open_storage(default_url(tmp_path / "none" / "study.db"))
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_database_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "study.db").write_text("my notes, several pages of them\n" * 40)
    with pytest.raises(StoreError, match=r"cannot use the storage .*: file is not a database"):
        open_storage(default_url(tmp_path / "study.db"))
    assert (tmp_path / "study.db").read_text().startswith("my notes")


def test_a_study_of_a_newer_optuna_is_a_storage_that_cannot_be_used(tmp_path: Path) -> None:
    import sqlalchemy

    url = default_url(tmp_path / "study.db")
    storage = open_storage(url)
    with storage.engine.begin() as connection:
        connection.execute(sqlalchemy.text("UPDATE alembic_version SET version_num = 'v99.0.0.a'"))
    storage.engine.dispose()
    with pytest.raises(StoreError, match="cannot use the storage"):
        open_storage(url)


@pytest.mark.parametrize("url", ["", "study.db", "sqlite", "://x", "C:\\runs\\study.db"])
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match="not the URL of a storage; write sqlite:///PATH"):
        open_storage(url)


def test_an_unknown_database_is_refused() -> None:
    with pytest.raises(UsageError, match="cannot read the storage URL weird://x"):
        open_storage("weird://x")


@pytest.mark.parametrize(
    ("url", "masked"),
    [
        ("postgresql://me:secret@db:5432/x", "postgresql://me:***@db:5432/x"),
        ("postgresql+psycopg2://me:sec:r/et@db/x", "postgresql+psycopg2://me:***@db/x"),
        ("postgresql://me:s@cret@db/x?sslmode=require", "postgresql://me:***@db/x?sslmode=require"),
        ("postgresql://me@db/x?password=secret&sslmode=on", "postgresql://me@db/x?password=***&sslmode=on"),
        ("mysql://me:@db/x", "mysql://me:***@db/x"),
        ("postgresql://me@db/x", "postgresql://me@db/x"),
        ("sqlite:////runs/a@b:c/study.db", "sqlite:////runs/a@b:c/study.db"),
        ("not a url", "not a url"),
    ],
)
def test_passwords_are_masked(url: str, masked: str) -> None:
    assert masked_url(url) == masked


@pytest.mark.parametrize("url", ["postgres://me:s%40cret@db/x", "postgresql://me:s%40cret@db/x"])
def test_a_missing_driver_names_the_extra_and_no_password(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    without_drivers(monkeypatch, "psycopg", "psycopg2")
    with pytest.raises(MissingDependency, match=r"'psycopg' is needed .*autopeft\[postgres\]") as caught:
        open_storage(url)
    assert "cret" not in str(caught.value)
    assert (caught.value.package, caught.value.extra) == ("psycopg", "postgres")


def test_an_old_driver_that_is_missing_points_to_the_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    without_drivers(monkeypatch, "psycopg2")
    with pytest.raises(MissingDependency, match=r"written as postgresql://\.\.\."):
        open_storage("postgresql+psycopg2://me@db/x")


def test_a_server_that_cannot_be_reached_is_named_without_its_password() -> None:
    pytest.importorskip("psycopg", reason="no PostgreSQL driver is installed")
    with pytest.raises(StoreError, match=r"cannot use the storage .*me:\*\*\*@127\.0\.0\.1:1/x: .*refused") as caught:
        open_storage("postgresql://me:secret@127.0.0.1:1/x")
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_two_processes_make_one_sqlite_study(tmp_path: Path) -> None:
    url = default_url(tmp_path / "study.db")
    together(url)
    open_storage(url, create=False).engine.dispose()


def together(url: str, n: int = 3) -> None:
    """Open a storage from several new processes in the same moment."""
    children = [
        subprocess.Popen([sys.executable, "-W", "ignore", "-c", OPEN, url], stderr=subprocess.PIPE, text=True)
        for _ in range(n)
    ]
    messages = [child.communicate(timeout=120)[1] for child in children]
    assert [child.returncode for child in children] == [0] * n, messages


def test_workers_on_an_empty_postgresql_do_not_race(postgres_url: str) -> None:
    import sqlalchemy

    together(postgres_url)
    storage = open_storage(postgres_url)
    with storage.engine.connect() as connection:
        tables = sqlalchemy.inspect(connection).get_table_names()
        versions = connection.execute(sqlalchemy.text("SELECT count(*) FROM alembic_version")).scalar_one()
    assert "trials" in tables
    assert versions == 1
    storage.engine.dispose()


def test_tables_made_by_another_program_in_the_same_moment_are_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sqlalchemy.exc
    from optuna import storages

    real, calls = storages.RDBStorage, []

    def racing(url: str, **rest: Any) -> Any:
        calls.append(url)
        if len(calls) < 3:
            raise sqlalchemy.exc.OperationalError("CREATE", {}, Exception("table studies already exists"))
        return real(url, **rest)

    monkeypatch.setattr(storages, "RDBStorage", racing)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    open_storage(default_url(tmp_path / "study.db")).engine.dispose()
    assert len(calls) == 3
