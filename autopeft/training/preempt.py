"""Signals that ask the process to stop: noted at once, acted upon between two steps."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from autopeft.errors import Preempted

__all__ = ["preemptible", "requested", "stop_if_requested"]

_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))
"""What Slurm, Kubernetes and `timeout` send some time before SIGKILL."""

_received: list[int] = []


def requested() -> bool:
    """Whether a signal has asked this process to stop, inside of `preemptible`."""
    return bool(_received)


def stop_if_requested(saved: str) -> None:
    """Raise when a signal has asked the process to stop.

    Args:
        saved: what is safe on disk, as the end of the message's sentence.

    Raises:
        Preempted: when asked to stop.
    """
    if _received:
        raise Preempted(f"stopped by {signal.Signals(_received[0]).name}; {saved}, the same command continues")


@contextlib.contextmanager
def preemptible() -> Iterator[None]:
    """Note SIGTERM and SIGUSR1 instead of dying of them; the former handlers are put back at exit.

    Training then saves its checkpoint after the current step and raises `Preempted`. A second signal changes nothing.
    Outside of the main thread, where Python cannot install handlers, signals do what they did before.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def note(number: int, frame: FrameType | None) -> None:
        _received.append(number)

    before: dict[int, Any] = {number: signal.signal(number, note) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            # A handler that was not installed from Python reads back as None and cannot be set again.
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        _received.clear()
