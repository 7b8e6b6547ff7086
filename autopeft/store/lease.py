"""Who works on a trial, and whether that process still lives."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from autopeft.core import codec

__all__ = ["Lease"]

_PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class Lease:
    """A process's claim on a trial.

    A process of this machine is looked up: it is alive when its id exists, is no zombie, and started when the lease
    says, so that a recycled id is not mistaken for it. A process that cannot be looked up, on another host or in
    another container, is judged by its heartbeat.

    Attributes:
        host: the machine's name.
        pid: the process's id.
        started: when the process started, in clock ticks since boot; 0 where the system does not tell.
        machine: identity of the boot and of the process name space; ids of two processes compare only where it agrees.
        beat: time of the last heartbeat, in seconds since 1970.
    """

    host: str
    pid: int
    started: int
    machine: str
    beat: float

    SCHEMA: ClassVar[str] = "autopeft.lease/1"
    GRACE: ClassVar[float] = 180.0
    """Seconds without a heartbeat after which a process elsewhere is taken for dead."""

    @classmethod
    def current(cls, now: float | None = None) -> Lease:
        """The lease of this process, beating now.

        Args:
            now: seconds since 1970; the clock's when None.
        """
        pid = os.getpid()
        return cls(socket.gethostname(), pid, _started(pid) or 0, _machine(), time.time() if now is None else now)

    def renewed(self, now: float | None = None) -> Lease:
        """The same lease with a heartbeat now."""
        return dataclasses.replace(self, beat=time.time() if now is None else now)

    @property
    def local(self) -> bool:
        """Whether the process can be looked up from here."""
        return (self.host, self.machine) == (socket.gethostname(), _machine())

    def alive(self, now: float | None = None, grace: float = GRACE) -> bool:
        """Whether the process still lives, as far as can be known from here.

        Args:
            now: seconds since 1970; the clock's when None.
            grace: seconds that a process elsewhere may go without a heartbeat.
        """
        if not self.local:
            return (time.time() if now is None else now) - self.beat <= grace
        if not _exists(self.pid):
            return False
        return not self.started or _started(self.pid) == self.started

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.beat))
        return f"process {self.pid} on {self.host} (last seen {since})"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a trial's attributes or a lock file."""
        data: dict[str, Any] = codec.encode(self)
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "lease") -> Lease:
        """The lease that `to_dict` wrote.

        Args:
            data: the plain data.
            where: what to call it in messages.

        Raises:
            CorruptFile: when the data is no lease.
        """
        return codec.decode(cls, dict(data), where)


def _machine() -> str:
    # Two containers of one machine share the boot id but not the name space that process ids live in.
    parts = []
    with contextlib.suppress(OSError):
        parts.append((_PROC / "sys/kernel/random/boot_id").read_text().strip())
    with contextlib.suppress(OSError):
        parts.append(os.readlink(_PROC / "self/ns/pid"))
    return " ".join(parts)


def _started(pid: int) -> int | None:
    """Start time in clock ticks since boot; None for a process that is gone, is a zombie, or cannot be looked up."""
    try:
        text = (_PROC / str(pid) / "stat").read_text()
    except OSError:
        return None
    # The second field is the program's name in parentheses and may itself hold spaces and parentheses.
    fields = text[text.rindex(")") + 2 :].split()
    return None if fields[0] in ("Z", "X") else int(fields[19])


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
