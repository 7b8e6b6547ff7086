"""The knapsack as a mixed-integer programme, for side constraints and for components too large to enumerate."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from autopeft.core.menu import Option
from autopeft.core.site import Place
from autopeft.errors import AutopeftError, UsageError

__all__ = ["MilpPacking", "Programme", "quiet_stdout"]

_SCALE = 1e4
"""The objective is scaled to this size: HiGHS stops at an absolute gap of 1e-6, which must mean nothing."""

_ATTEMPTS = 8

_FEW = 200
"""Programmes with no more whole columns are solved as they are, and that many are open to find a first solution."""

_ROOM = 1e-9
"""Relative room for rounding before a column is fixed."""


@dataclass(frozen=True, slots=True)
class MilpPacking:
    """What HiGHS found.

    Attributes:
        chosen: positions of the chosen options, increasing.
        value: of the objective.
        bound: no choice within the constraints is worth more.
        price: worth of a further unit of budget in the linear relaxation.
    """

    chosen: tuple[int, ...]
    value: float
    bound: float
    price: float


class Programme:
    """A mixed-integer programme that is put together column by column and row by row.

    The first columns are the options, in their order: 1 when an option is chosen. At most one of each place is.

    Args:
        options: the options in canonical order.
        worth: what each adds to the objective, float64 of shape (n,).

    Attributes:
        n: number of options.
        value: what the objective is of a choice; the sum of the options' worth unless it is replaced.
        exact: what a choice comes to, and the limit that it must keep exactly: HiGHS does so up to a tolerance.
    """

    def __init__(self, options: Sequence[Option], worth: Any) -> None:
        self.n = len(options)
        self.value: Callable[[Any], float] = lambda chosen: math.fsum(worth[chosen].tolist())
        self.exact: list[tuple[Callable[[Any], float], float]] = []
        self.worth = [float(w) for w in worth]
        self._least = [0.0] * self.n
        self._most = [1.0] * self.n
        self._whole = [True] * self.n
        self._columns: list[Any] = []
        self._values: list[Any] = []
        self._limits: list[float] = []
        places: dict[Place, list[int]] = {}
        for i, option in enumerate(options):
            for place in option.places:
                places.setdefault(place, []).append(i)
        self.by_place = tuple(places.values())
        for members in self.by_place:
            if len(members) > 1:
                self.row(members, np.ones(len(members)), 1.0)

    def column(self, worth: float = 0.0, most: float = 1.0, least: float = 0.0, whole: bool = False) -> int:
        """A further column from `least` to `most`; its position."""
        self.worth.append(worth)
        self._least.append(least)
        self._most.append(most)
        self._whole.append(whole)
        return len(self.worth) - 1

    def row(self, columns: Sequence[int], values: Any, high: float) -> int:
        """`sum of values times columns <= high`; its position."""
        self._columns.append(np.asarray(columns, dtype=np.int64))
        self._values.append(np.asarray(values, dtype=np.float64))
        self._limits.append(float(high))
        return len(self._limits) - 1

    def spend(self, costs: Any, limit: int) -> int:
        """The row of the budget."""
        self.exact.append((lambda chosen: int(costs[chosen].sum()), limit))
        return self.row(range(self.n), costs, limit)

    def bar(self, chosen: Any) -> None:
        """Forbid this one choice of options and no other (a no-good cut)."""
        held = np.isin(np.arange(self.n), chosen)
        self.row(range(self.n), np.where(held, 1.0, -1.0), float(held.sum()) - 1)

    def solve(self, budget: int | None, gap: float = 0.0, seconds: float = math.inf) -> MilpPacking | None:
        """The best choice; None when there is none.

        Args:
            budget: the row whose price is asked for, None for none.
            gap: relative gap to the bound at which to stop.
            seconds: time after which to stop with the best found.

        Raises:
            UsageError: when the time is over before anything was found.
        """
        import scipy.sparse

        worth = np.array(self.worth)
        if len(worth) == 0:
            kept = all(limit >= 0 for limit in self._limits)
            return MilpPacking((), 0.0, 0.0, 0.0) if kept else None
        scale = _SCALE / max(float(np.abs(worth).max()), 1e-300)
        deadline = time.perf_counter() + seconds
        for _ in range(_ATTEMPTS):
            model = _Model(
                -worth * scale,
                self._matrix(scipy.sparse),
                np.array(self._limits),
                np.array(self._least),
                np.array(self._most),
                np.array(self._whole),
            )
            linear = model.relaxed()
            found = model.solved(linear, gap, deadline)
            if found.status == 2:
                return None
            if found.x is None:
                if found.status == 1:
                    raise UsageError(f"HiGHS found no plan in {seconds:g} s; raise time_limit of the knapsack")
                raise AutopeftError(f"HiGHS gave up on {self.n} options: {found.message}")
            chosen = np.flatnonzero(found.x[: self.n] > 0.5)
            excess = max((used(chosen) - limit for used, limit in self.exact), default=0.0)
            if excess <= 0:
                break
            # HiGHS keeps rows up to a tolerance; on budgets of millions that can be a whole parameter.
            self.bar(chosen)
        else:
            raise AutopeftError(f"HiGHS kept exceeding the limits on {self.n} options, by {excess:g} at last")
        value = self.value(chosen)
        bound = -float(found.mip_dual_bound) / scale
        priced = budget is not None and linear.status == 0
        price = -float(linear.ineqlin.marginals[budget]) / scale if priced else 0.0
        if found.status == 0 and bound - value <= 1e-9 * max(abs(bound), abs(value)):
            bound = value
        return MilpPacking(tuple(chosen.tolist()), value, max(bound, value), max(price, 0.0))

    def _matrix(self, sparse: Any) -> Any:
        sizes = [len(columns) for columns in self._columns]
        row = np.repeat(np.arange(len(sizes)), sizes)
        column = np.concatenate([np.empty(0, np.int64), *self._columns])
        value = np.concatenate([np.empty(0), *self._values])
        return sparse.csr_array((value, (row, column)), shape=(len(sizes), len(self.worth)))


@dataclass(frozen=True, slots=True)
class _Model:
    """Least `objective @ x` with `matrix @ x <= upper` and `low <= x <= high`, some columns whole numbers."""

    objective: Any
    matrix: Any
    upper: Any
    low: Any
    high: Any
    whole: Any

    def relaxed(self) -> Any:
        """The linear relaxation, with its reduced costs."""
        with quiet_stdout():
            return _solvers().linprog(
                self.objective, A_ub=self.matrix, b_ub=self.upper, bounds=np.stack((self.low, self.high), 1)
            )

    def solved(self, linear: Any, gap: float, deadline: float) -> Any:
        """The programme itself, on the columns that the relaxation leaves open.

        The relaxation and the reduced cost of a column bound what any solution with that column moved off its bound can
        reach; where a solution is known that is better, the column stays. One is sought among the columns that the
        relaxation is least decided about.
        """
        whole, price = self.whole, linear.lower.marginals + linear.upper.marginals if linear.status == 0 else None
        if price is None or whole.sum() <= _FEW:
            return self._run(self.low, self.high, gap, deadline)
        bent = self._fixed(linear.x, np.abs(price), np.partition(np.abs(price)[whole], _FEW)[_FEW])
        known = self._run(*bent, 0.0, deadline)
        if known.x is None:
            return self._run(self.low, self.high, gap, deadline)
        room = known.fun - linear.fun
        return self._run(*self._fixed(linear.x, np.abs(price), room + _ROOM * abs(linear.fun)), gap, deadline)

    def _fixed(self, x: Any, price: Any, room: float) -> tuple[Any, Any]:
        """Bounds with whole columns whose reduced cost is above `room` held where the relaxation has them."""
        held = self.whole & (price > room)
        at = np.round(x)
        return np.where(held, at, self.low), np.where(held, at, self.high)

    def _run(self, low: Any, high: Any, gap: float, deadline: float) -> Any:
        seconds = deadline - time.perf_counter()
        settings = {"mip_rel_gap": gap, **({"time_limit": max(seconds, 1e-3)} if math.isfinite(seconds) else {})}
        solvers = _solvers()
        with quiet_stdout():
            return solvers.milp(
                self.objective,
                constraints=solvers.LinearConstraint(self.matrix, ub=self.upper),
                integrality=self.whole.astype(np.int64),
                bounds=solvers.Bounds(low, high),
                options=settings,
            )


def _solvers() -> Any:
    """`scipy.optimize`, untyped: its stubs reject arrays that it accepts."""
    import scipy.optimize

    return scipy.optimize


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
