"""One process per run folder."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from types import TracebackType

from autopeft.errors import AutopeftError, RunLocked, StoreError
from autopeft.store.lease import Lease

__all__ = ["RunLock"]

_HELD: set[int] = set()
"""Descriptors of the locks this process holds."""


class RunLock:
    """An exclusive lock on a file, released when the process ends in whatever way.

    The file stays, empty, when the lock is released: removing it would let two processes lock two files of one name.

    Args:
        path: the lock file, `RunFolder.lock`; its folder exists.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None

    def __enter__(self) -> RunLock:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    @property
    def held(self) -> bool:
        """Whether this object holds the lock."""
        return self._descriptor is not None

    def acquire(self) -> None:
        """Take the lock now or not at all.

        Raises:
            RunLocked: naming the process that holds it.
            StoreError: when the lock file cannot be opened.
        """
        if self._descriptor is not None:
            raise StoreError(f"this process holds the lock {self.path} already")
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise StoreError(f"cannot open the lock file {self.path}: {error.strerror or error}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise RunLocked(
                f"{self.holder() or 'another process'} works in {self.path.parent}; "
                "wait for it to end, or choose another --output"
            ) from None
        except OSError as error:
            os.close(descriptor)
            raise StoreError(f"cannot lock {self.path}: {error.strerror or error}") from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(Lease.current().to_dict()).encode(), 0)
        _HELD.add(descriptor)
        self._descriptor = descriptor

    def release(self) -> None:
        """Give the lock back; nothing happens when it is not held."""
        if self._descriptor is None:
            return
        descriptor, self._descriptor = self._descriptor, None
        if descriptor not in _HELD:
            return
        _HELD.discard(descriptor)
        os.ftruncate(descriptor, 0)
        os.close(descriptor)

    def holder(self) -> Lease | None:
        """Who wrote the lock file last; None when it is empty, being written, or absent."""
        try:
            return Lease.from_dict(json.loads(self.path.read_text()))
        except (OSError, ValueError, AutopeftError):
            return None


def _close_in_child() -> None:
    # A forked data-loading process shares the lock and would keep it after its parent was killed.
    for descriptor in _HELD:
        os.close(descriptor)
    _HELD.clear()


os.register_at_fork(after_in_child=_close_in_child)
