"""How many torch threads to train with, set explicitly and put back."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

from autopeft.errors import UsageError

__all__ = ["choose_threads", "cores", "thread_count"]

_SMALL = 5_000_000
"""Below so many parameters the kernels are too short for a second thread to pay."""

_BUSY = 0.5
"""Load per core above which the machine counts as loaded: threads that fight over busy cores run slower than one."""


def cores() -> int:
    """Cores this process may use: its affinity where the system has one, else the machine's."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def choose_threads(n_parameters: int, *, load: float | None = None, available: int | None = None) -> int:
    """One thread for a model below 5 million parameters or on a loaded machine, else one per free core.

    Choose once per run: results are equal bit for bit only at equal thread counts.

    Args:
        n_parameters: parameters of the base model.
        load: processes that want to run (the one-minute load average); measured when None.
        available: cores this process may use; measured when None.
    """
    n = cores() if available is None else available
    if n_parameters < _SMALL or n <= 1:
        return 1
    if load is None:
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > _BUSY * n:
        return 1
    return max(1, n - round(load))


@contextlib.contextmanager
def thread_count(n: int) -> Iterator[int]:
    """Run with `n` torch threads (intra-op), and put the number back at exit.

    Raises:
        UsageError: when `n` is not a whole number of at least 1.
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise UsageError(f"the number of threads must be a whole number of at least 1, got {n!r}")
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield n
    finally:
        torch.set_num_threads(before)
