"""How long a trial runs before it must be among the best: rungs and brackets in whole epochs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from autopeft.errors import UsageError

__all__ = ["Rungs"]


@dataclass(frozen=True, slots=True)
class Rungs:
    """Hyperband's brackets (Li et al., JMLR 2018) over epochs of one full schedule.

    Every trial runs under the schedule of `max_epochs` and may be stopped at a rung, so that values at one epoch
    compare. Rungs lie at `max_epochs / eta^k`, rounded. Bracket b skips the b earliest of them, the last bracket has
    none; a share of the trials is thus safe from a judgement that comes too early.

    Attributes:
        max_epochs: epochs of a trial that is not stopped.
        eta: one in `eta` trials passes a rung.
        min_epochs: no rung lies before.

    Raises:
        UsageError: for values that make no ladder.
    """

    max_epochs: int
    eta: int = 3
    min_epochs: int = 1

    def __post_init__(self) -> None:
        if self.max_epochs < 1 or self.min_epochs < 1:
            raise UsageError(f"rungs need at least 1 epoch, got min_epochs={self.min_epochs}, max={self.max_epochs}")
        if self.eta < 2:
            raise UsageError(f"eta must be at least 2, got {self.eta}")

    @property
    def halvings(self) -> int:
        """Rungs of the first bracket: the largest s with `min_epochs * eta^s <= max_epochs`."""
        s = 0
        while self.min_epochs * self.eta ** (s + 1) <= self.max_epochs:
            s += 1
        return s

    def rungs(self, bracket: int) -> tuple[int, ...]:
        """Epochs after which a trial of this bracket is judged, increasing, all below `max_epochs`."""
        if not 0 <= bracket <= self.halvings:
            raise UsageError(f"brackets are numbered 0 to {self.halvings}, got {bracket}")
        return tuple(
            max(self.min_epochs, round(self.max_epochs / self.eta**k)) for k in range(self.halvings - bracket, 0, -1)
        )

    def bracket(self, ordinal: int) -> int:
        """The bracket of a trial, by its place in the search.

        Hyperband starts `ceil((s_max + 1) / (s + 1) * eta^s)` trials in the bracket of s rungs. Here trials join one by
        one, each the bracket that is furthest behind that share; ties go to the bracket with more rungs.
        """
        shares = [math.ceil((self.halvings + 1) / (s + 1) * self.eta**s) for s in range(self.halvings, -1, -1)]
        total = sum(shares)
        joined = [0] * len(shares)
        chosen = 0
        for place in range(ordinal % total + 1):
            behind = [share * (place + 1) - total * n for share, n in zip(shares, joined, strict=True)]
            chosen = behind.index(max(behind))
            joined[chosen] += 1
        return chosen
