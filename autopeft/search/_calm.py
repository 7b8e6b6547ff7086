"""Optuna without its warnings and log lines, and with our errors."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Iterator

import optuna
import sqlalchemy.exc
from optuna.exceptions import ExperimentalWarning, StorageInternalError

from autopeft.errors import StoreError

__all__ = ["calm"]

_LOCK = threading.RLock()
"""Verbosity and warning filters are the process's; the heart beats from a thread of its own."""


@contextlib.contextmanager
def calm(where: str) -> Iterator[None]:
    """Call Optuna quietly.

    Args:
        where: the storage, for messages, with its password masked.

    Raises:
        StoreError: when the storage fails.
    """
    with _LOCK:
        before = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ExperimentalWarning)
                yield
        except (sqlalchemy.exc.SQLAlchemyError, StorageInternalError) as error:
            original = getattr(error, "orig", None) or error.__cause__ or error
            reason = (str(original).strip() or type(original).__name__).splitlines()[0]
            raise StoreError(f"the storage {where} cannot be used: {reason}") from error
        finally:
            optuna.logging.set_verbosity(before)
