"""The knapsack with side constraints as a mixed-integer programme."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from autopeft.allocation._milp import MilpPacking, Programme
from autopeft.allocation._rules import Bundle, Row
from autopeft.core.cap import Cap

__all__ = ["Problem", "curve_points"]

_POINTS = 16
"""Straight pieces that a block's curve is made of, at most."""


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """What is to be solved.

    Attributes:
        bundles: what can be bought, in canonical order.
        costs: in the budget's unit, int64 of shape (n,).
        gains: float64 of shape (n,).
        rows: linear constraints.
        max_methods: largest number of methods, None for any.
        caps: further limits.
        blocks: per block, shares of the bundles that reach into it: position to a share of its gain. Empty, unless
            blocks have curves.
        curve: exponent of the blocks' curves; 1 is the plain sum.
    """

    bundles: tuple[Bundle, ...]
    costs: Any
    gains: Any
    rows: tuple[Row, ...] = ()
    max_methods: int | None = None
    caps: tuple[Cap, ...] = ()
    blocks: tuple[Mapping[int, float], ...] = ()
    curve: float = 1.0

    @property
    def plain(self) -> bool:
        """Whether it is a knapsack and nothing else."""
        return self.linear and not self.rows and self.max_methods is None and not self.caps

    @property
    def counts_methods_alone(self) -> bool:
        """Whether the number of methods is all that is held besides the budget."""
        return self.linear and not self.rows and self.max_methods is not None and not self.caps

    @property
    def linear(self) -> bool:
        """Whether the objective is the sum of the gains."""
        return self.curve == 1.0

    def keeps(self, chosen: Sequence[int]) -> bool:
        """Whether a choice keeps everything but the budget."""
        options = [o for i in chosen for o in self.bundles[i].members]
        methods = len({o.method for o in options})
        return (
            all(row.kept(chosen) for row in self.rows)
            and (self.max_methods is None or methods <= self.max_methods)
            and all(cap.used(options) <= cap.most for cap in self.caps)
        )

    def useful(self) -> Any:
        """Positions of what can be part of a good plan: what gains, and what a lower limit may call for."""
        called = {i for row in self.rows if row.low > -math.inf for i in row.members}
        return np.array([i for i in range(len(self.bundles)) if self.gains[i] > 0 or i in called], dtype=np.int64)

    def solve(
        self, limit: int, gap: float, seconds: float, barred: Collection[int] | None = None
    ) -> MilpPacking | None:
        """The best plan, by HiGHS; None when there is none.

        Args:
            limit: the budget.
            gap: relative gap to the bound at which to stop.
            seconds: time after which to stop with the best found.
            barred: a choice that is not allowed (a no-good cut), None for none.
        """
        kept = self.useful()
        kept = kept[self.costs[kept] <= limit]
        programme = self._programme(kept, self.gains[kept])
        if not self.linear:
            self._bend(programme, kept)
        if barred is not None:
            programme.bar(np.flatnonzero(np.isin(kept, sorted(barred))))
        return _named(programme.solve(programme.spend(self.costs[kept], limit), gap, seconds), kept)

    def cheapest(self, seconds: float) -> MilpPacking | None:
        """The plan of least cost within everything but the budget, which buys something; None when there is none."""
        kept = np.arange(len(self.bundles))
        programme = self._programme(kept, -self.costs.astype(np.float64))
        programme.row(range(len(kept)), -np.ones(len(kept)), -1.0)
        return programme.solve(None, 0.0, seconds)

    def value(self, chosen: Any) -> float:
        """The objective of a choice of bundles."""
        if self.linear:
            return math.fsum(self.gains[list(chosen)].tolist())
        held = set(chosen)
        inside = [math.fsum(share * self.gains[i] for i, share in block.items() if i in held) for block in self.blocks]
        return math.fsum(_bent(total, x, y) for total, (x, y) in zip(inside, self._curves(), strict=True))

    def _curves(self) -> list[tuple[Any, Any]]:
        return [
            curve_points(math.fsum(max(0.0, share * self.gains[i]) for i, share in block.items()), self.curve)
            for block in self.blocks
        ]

    def _programme(self, kept: Any, worth: Any) -> Programme:
        at = {int(i): k for k, i in enumerate(kept)}
        programme = Programme([self.bundles[i].option for i in kept], worth)
        for row in self.rows:
            pairs = [(at[i], v) for i, v in zip(row.members, row.values, strict=True) if i in at]
            columns, values = [c for c, _ in pairs], np.array([v for _, v in pairs])
            if row.high < math.inf:
                programme.row(columns, values, row.high)
            if row.low > -math.inf:
                programme.row(columns, -values, -row.low)
        if self.max_methods is not None:
            self._count_methods(programme, kept, self.max_methods)
        for cap in self.caps:
            self._hold(programme, kept, cap)
        return programme

    def _count_methods(self, programme: Programme, kept: Any, most: int) -> None:
        """A column per method that is 1 when anything of it is bought."""
        methods = [{o.method for o in self.bundles[i].members} for i in kept]
        keys = {key: programme.column(whole=True) for key in sorted(set().union(*methods))}
        for key, column in keys.items():
            _switched(programme, [k for k, own in enumerate(methods) if key in own], column)
        programme.row(list(keys.values()), np.ones(len(keys)), most)

    def _hold(self, programme: Programme, kept: Any, cap: Cap) -> None:
        """A column per shared term; in numbers of the order of one, as HiGHS's tolerances are absolute."""
        idents = [[o.ident for o in self.bundles[i].members] for i in kept]
        unit = max(cap.most - cap.fixed, 1e-9 * max(cap.most, 1.0))
        own = [math.fsum(cap.own.get(ident, 0.0) for ident in group) / unit for group in idents]
        terms = [programme.column() for _ in cap.terms]
        callers: list[list[int]] = [[] for _ in terms]
        for k, group in enumerate(idents):
            for t in {t for ident in group for t in cap.triggers.get(ident, ())}:
                callers[t].append(k)
        for column, term, members in zip(terms, cap.terms, callers, strict=True):
            if term.after >= 0:
                programme.row([terms[term.after], column], [1.0, -1.0], 0.0)
            _switched(programme, members, column)
        amounts = [term.amount / unit for term in cap.terms]
        besides: dict[int, dict[int, float]] = {}
        for k, group in enumerate(idents):
            for t, amount in (pair for ident in group for pair in cap.extra.get(ident, ())):
                here = besides.setdefault(t, {})
                here[k] = here.get(k, 0.0) + amount / unit
        extra = [column for t, per in besides.items() for column in _products(programme, per, terms[t])]
        columns = [*range(len(kept)), *terms, *extra]
        programme.row(columns, [*own, *amounts, *[1.0] * len(extra)], (cap.most - cap.fixed) / unit)

        def used(chosen: Any) -> float:
            options = [o for k in chosen for o in self.bundles[kept[k]].members]
            return cap.used(options) / unit

        programme.exact.append((used, cap.most / unit))

    def _bend(self, programme: Programme, kept: Any) -> None:
        """A column per block that lies under every straight piece of its curve, in place of the options' own worth."""
        at = {int(i): k for k, i in enumerate(kept)}
        programme.worth[: len(kept)] = [0.0] * len(kept)
        for block, (x, y) in zip(self.blocks, self._curves(), strict=True):
            top = programme.column(1.0, most=float(y[-1]), least=-math.inf)
            pairs = [(at[i], share * self.gains[i]) for i, share in block.items() if i in at]
            columns = [top, *(c for c, _ in pairs)]
            for (x0, y0), (x1, y1) in pairwise(zip(x.tolist(), y.tolist(), strict=True)):
                slope = (y1 - y0) / (x1 - x0)
                programme.row(columns, [1.0, *(-slope * v for _, v in pairs)], y0 - slope * x0)
        programme.value = lambda chosen: self.value(kept[chosen].tolist())


def curve_points(top: float, exponent: float) -> tuple[Any, Any]:
    """Corners of `x^exponent` on [0, top], made of straight pieces below it; geometrically closer towards 0.

    Returns:
        float64 arrays of x and y, both increasing from 0; the identity when there is nothing to gain.
    """
    if top <= 0:
        return np.arange(2.0), np.arange(2.0)
    x = np.concatenate(([0.0], top * 2.0 ** -np.arange(_POINTS - 1, -1, -1.0)))
    return x, x**exponent


def _bent(total: float, x: Any, y: Any) -> float:
    """The curve at a block's total; below 0, where only what is required can lead, its first piece goes on."""
    return float(np.interp(total, x, y)) if total >= 0 else float(total * y[1] / x[1])


def _switched(programme: Programme, members: Sequence[int], column: int) -> None:
    """The column is at least the sum over the members of any one place, which is 1 when one is chosen."""
    wanted = set(members)
    left = set(members)
    for place in programme.by_place:
        here = [k for k in place if k in wanted]
        if left & set(here):
            programme.row([*here, column], [1.0] * len(here) + [-1.0], 0.0)
            left -= set(here)


def _products(programme: Programme, amounts: Mapping[int, float], switch: int) -> Iterator[int]:
    """Columns that are at least the amounts of the chosen members when the switch is 1, and 0 when it is 0."""
    left = {k: amount for k, amount in amounts.items() if amount > 0}
    for place in programme.by_place:
        here = [k for k in place if k in left]
        if here:
            column, most = programme.column(most=math.inf), max(left[k] for k in here)
            programme.row([*here, switch, column], [*(left.pop(k) for k in here), most, -1.0], most)
            yield column


def _named(found: MilpPacking | None, kept: Any) -> MilpPacking | None:
    if found is None:
        return None
    return MilpPacking(tuple(int(kept[k]) for k in found.chosen), found.value, found.bound, found.price)
