"""The knapsack as a mixed-integer programme, for side constraints and for components too large to enumerate."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from autopeft.core.menu import Option
from autopeft.core.site import Place
from autopeft.errors import AutopeftError, UsageError

__all__ = ["MilpPacking", "pack", "quiet_stdout"]

_SCALE = 1e4
"""The objective is scaled to this size: HiGHS stops at an absolute gap of 1e-6, which must mean nothing."""

_ATTEMPTS = 8


@dataclass(frozen=True, slots=True)
class MilpPacking:
    """What HiGHS found.

    Attributes:
        chosen: positions of the chosen options, increasing.
        bound: no choice within the constraints gains more.
        price: gain per further unit of budget in the linear relaxation.
    """

    chosen: tuple[int, ...]
    bound: float
    price: float


def pack(
    options: Sequence[Option],
    costs: Any,
    gains: Any,
    limit: int,
    *,
    covers: Sequence[Sequence[int]] = (),
    max_options: int | None = None,
    gap: float = 0.0,
    seconds: float = math.inf,
) -> MilpPacking | None:
    """The best choice under the budget, one option per place, and side constraints; None when there is none.

    Args:
        options: the options in canonical order.
        costs: their costs, int64 of shape (n,).
        gains: their gains, float64 of shape (n,); negative ones are allowed, for options that a cover forces.
        limit: largest total cost.
        covers: of each of these sets of positions at least one is chosen.
        max_options: largest number of options, None for any.
        gap: relative gap to the bound at which to stop.
        seconds: time after which to stop with the best found.

    Raises:
        UsageError: when the time is over before anything was found.
    """
    import scipy.optimize
    import scipy.sparse

    # Any, with and without scipy's stubs installed: they reject arrays that scipy accepts.
    solvers: Any = scipy.optimize
    n = len(options)
    if n == 0:
        return MilpPacking((), 0.0, 0.0) if not covers else None
    places: dict[Place, list[int]] = {}
    for i, option in enumerate(options):
        for place in option.places:
            places.setdefault(place, []).append(i)
    rows: list[tuple[Sequence[int], float]] = [(members, 1.0) for members in places.values() if len(members) > 1]
    if max_options is not None:
        rows.append((range(n), float(max_options)))
    column = np.concatenate([np.arange(n), *[np.fromiter(m, np.int64) for m, _ in rows], *map(np.array, covers)])
    sizes = [n, *[len(m) for m, _ in rows], *[len(m) for m in covers]]
    value = np.concatenate([costs, np.ones(sum(sizes[1 : 1 + len(rows)])), -np.ones(sum(sizes[1 + len(rows) :]))])
    row = np.repeat(np.arange(len(sizes)), sizes)
    matrix = scipy.sparse.csr_array((value.astype(np.float64), (row, column.astype(np.int64))), shape=(len(sizes), n))
    upper = np.array([float(limit), *[bound for _, bound in rows], *[-1.0] * len(covers)])
    scale = _SCALE / max(float(np.abs(gains).max()), 1e-300)
    settings = {"mip_rel_gap": gap, **({"time_limit": seconds} if math.isfinite(seconds) else {})}
    for _ in range(_ATTEMPTS):
        with quiet_stdout():
            found = solvers.milp(
                -gains * scale,
                constraints=solvers.LinearConstraint(matrix, ub=upper),
                integrality=np.ones(n),
                bounds=solvers.Bounds(0, 1),
                options=settings,
            )
        if found.status == 2:
            return None
        if found.x is None:
            if found.status == 1:
                raise UsageError(f"HiGHS found no plan in {seconds:g} s; raise time_limit of the knapsack")
            raise AutopeftError(f"HiGHS gave up on {n} options: {found.message}")
        chosen = np.flatnonzero(found.x > 0.5)
        excess = int(costs[chosen].sum()) - limit
        if excess <= 0:
            break
        # HiGHS keeps rows up to a tolerance; on budgets of millions that can be a whole parameter.
        upper[0] -= excess
    else:
        raise AutopeftError(f"HiGHS kept exceeding the budget of {limit:,} on {n} options")
    gain = math.fsum(gains[chosen].tolist())
    bound = -float(found.mip_dual_bound) / scale
    with quiet_stdout():
        linear = solvers.linprog(-gains * scale, A_ub=matrix, b_ub=upper, bounds=(0, 1), method="highs")
    price = -float(linear.ineqlin.marginals[0]) / scale if linear.status == 0 else 0.0
    if found.status == 0 and upper[0] == limit and bound - gain <= 1e-9 * max(abs(bound), abs(gain)):
        bound = gain
    return MilpPacking(tuple(chosen.tolist()), max(bound, gain), max(price, 0.0))


@contextlib.contextmanager
def quiet_stdout() -> Iterator[None]:
    """Send what native code writes to file descriptor 1 to nowhere: HiGHS prints there whatever it is asked."""
    with contextlib.suppress(ValueError, OSError):
        sys.stdout.flush()
    try:
        saved = os.dup(1)
    except OSError:  # Standard output is closed: nothing to protect.
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        _flush_native()
        os.dup2(saved, 1)
        os.close(saved)
        os.close(nowhere)


def _flush_native() -> None:
    """Flush C's own buffer while it still leads nowhere."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).fflush(None)
