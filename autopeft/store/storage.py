"""The outer loop's storage: any URL that Optuna takes, opened with clear errors and without races."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from autopeft.errors import MissingDependency, StoreError, UsageError

if TYPE_CHECKING:
    from optuna.storages import RDBStorage

__all__ = ["default_url", "masked_url", "open_storage"]

_URL = re.compile(r"^(?P<dialect>[a-z0-9]+)(?:\+(?P<driver>[a-z0-9_]+))?://(?P<rest>.*)$", re.DOTALL)
_CREDENTIALS = re.compile(r"^(?P<user>[^:@/]*):(?P<password>[^?]*)@")
_SECRET_QUERY = re.compile(r"(?P<key>[?&](?:password|passwd|sslpassword)=)[^&]*")

_ATTEMPTS = 5
_BUSY_SECONDS = 60.0
"""How long a writer waits for another one's transaction on SQLite."""
_CONNECT_SECONDS = 10

_SCHEMA_LOCK = 0x6175746F70656674
"""Key of PostgreSQL's advisory lock around the creation of the schema: `autopeft` in ASCII."""


def default_url(database: Path) -> str:
    """The URL of a SQLite file, such as `RunFolder.database`.

    Args:
        database: path of the file; it need not exist.
    """
    from sqlalchemy import URL

    # SQLAlchemy 2.1 decodes %XX in a path and 2.0 does not: only its own writer knows what its reader does.
    url = URL.create("sqlite", database=str(database.absolute())).render_as_string()
    return url.replace("{", "{{").replace("}", "}}")  # Optuna formats the URL as a template.


def masked_url(url: str) -> str:
    """The URL with its passwords replaced by `***`, for messages, logs and reports."""
    match = _URL.match(url)
    if match is None:
        return url
    head = url[: match.start("rest")]
    rest = _CREDENTIALS.sub(lambda m: f"{m['user']}:***@", match["rest"])
    return head + _SECRET_QUERY.sub(lambda m: f"{m['key']}***", rest)


def open_storage(url: str, *, create: bool = True) -> RDBStorage:
    """Open a storage, making its tables when they are not there.

    Args:
        url: `sqlite:///...`, `postgresql://user:password@host/database`, `postgresql+psycopg2://...`, `mysql+...://...`.
        create: whether a SQLite file that does not exist may be made; False for reading an existing study.

    Raises:
        UsageError: when the text is no URL.
        MissingDependency: when the driver of PostgreSQL is not installed.
        StoreError: when the storage cannot be reached, is no storage of Optuna, or does not exist. Passwords are
            masked in every message.
    """
    url = _normalised(url)
    dialect = url.split(":", 1)[0].split("+")[0]
    kwargs: dict[str, Any] = {}
    if dialect == "sqlite":
        _check_sqlite(url, create)
        kwargs = {"connect_args": {"timeout": _BUSY_SECONDS}}
    elif dialect == "postgresql":
        kwargs = {"pool_pre_ping": True, "connect_args": {"connect_timeout": _CONNECT_SECONDS}}
    return _opened(url, dialect, kwargs)


def _normalised(url: str) -> str:
    match = _URL.match(url)
    if match is None:
        raise UsageError(
            f"{url!r} is not the URL of a storage; write sqlite:///PATH or postgresql://USER:PASSWORD@HOST/DATABASE"
        )
    dialect = "postgresql" if match["dialect"] == "postgres" else match["dialect"]
    driver = match["driver"]
    if dialect == "postgresql":
        known = [name for name in ("psycopg", "psycopg2") if importlib.util.find_spec(name) is not None]
        if driver is None and known:
            driver = known[0]
        if driver is None or (driver in ("psycopg", "psycopg2") and driver not in known):
            hint = " (written as postgresql://...)" if driver == "psycopg2" else ""
            raise MissingDependency("psycopg", "postgres", f"reach the storage {masked_url(url)}{hint}")
    return f"{dialect}{'+' + driver if driver else ''}://{match['rest']}"


def _check_sqlite(url: str, create: bool) -> None:
    from sqlalchemy import make_url

    path = make_url(url.replace("{{", "{").replace("}}", "}")).database or ":memory:"
    if path == ":memory:" or path.startswith("file:"):
        return
    file = Path(path)
    if not file.parent.is_dir():
        raise StoreError(f"the folder of the storage {file} does not exist")
    if not create and not file.is_file():
        raise StoreError(f"there is no storage at {file}; `autopeft search` makes it")


def _opened(url: str, dialect: str, kwargs: dict[str, Any]) -> RDBStorage:
    import sqlalchemy.exc
    from optuna.storages import RDBStorage

    for attempt in range(1, _ATTEMPTS + 1):
        try:
            with _schema_lock(url, kwargs) if dialect == "postgresql" else contextlib.nullcontext():
                return RDBStorage(url, engine_kwargs=kwargs)
        except ImportError as error:
            raise StoreError(f"the driver of the storage {masked_url(url)} is not installed") from error
        except sqlalchemy.exc.ArgumentError as error:
            raise UsageError(f"cannot read the storage URL {masked_url(url)}: {_reason(error, url)}") from error
        except (sqlalchemy.exc.DBAPIError, RuntimeError) as error:
            # Another program may make the tables in the same moment without taking our lock.
            if attempt < _ATTEMPTS and _is_race(error):
                time.sleep(0.1 * 2**attempt)
                continue
            raise StoreError(f"cannot use the storage {masked_url(url)}: {_reason(error, url)}") from error
        except sqlalchemy.exc.SQLAlchemyError as error:
            raise StoreError(f"cannot use the storage {masked_url(url)}: {_reason(error, url)}") from error
    raise AssertionError("unreachable: the last attempt returns or raises")


@contextlib.contextmanager
def _schema_lock(url: str, kwargs: dict[str, Any]) -> Iterator[None]:
    """Hold a lock in the database while the tables are made: CREATE TYPE of two workers would collide."""
    import sqlalchemy

    engine = sqlalchemy.create_engine(url, **kwargs)
    try:
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(sqlalchemy.text("SELECT pg_advisory_lock(:key)"), {"key": _SCHEMA_LOCK})
            try:
                yield
            finally:
                connection.execute(sqlalchemy.text("SELECT pg_advisory_unlock(:key)"), {"key": _SCHEMA_LOCK})
    finally:
        engine.dispose()


def _is_race(error: Exception) -> bool:
    text = str(error).lower()
    return "already exists" in text or "duplicate key" in text or "unique constraint" in text


def _reason(error: Exception, url: str) -> str:
    original = getattr(error, "orig", None) or error
    lines = str(original).strip().splitlines()
    text = lines[0].strip() if lines else type(original).__name__
    match = _URL.match(url)
    found = _CREDENTIALS.match(match["rest"]) if match else None
    if found and found["password"]:
        text = text.replace(found["password"], "***").replace(unquote(found["password"]), "***")
    return text
