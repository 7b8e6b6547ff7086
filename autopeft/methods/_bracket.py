"""Finding a magnitude of a given rank among tiles when it is known to within a little: one pass, on the CPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

__all__ = ["Bracket", "within"]

_LEAST, _FIRST, _MOST = 0.01, 0.02, 0.08
"""Half width of a bracket, relative to the level: a wider one would gather more than a histogram costs."""

_AHEAD = 2.0
"""How many times its last move the level may move next."""


def within(
    sweep: Callable[[], Iterable[Tensor]], rank: int, low: float, high: float, most: int
) -> tuple[Tensor, int] | None:
    """The `rank`-th smallest magnitude, counted from 1, if it lies in [low, high].

    Magnitudes below are counted, those between gathered: of few entries both cost a fraction of a histogram. Compared
    and gathered with numpy, which on a CPU is several times as fast at it as torch.

    Args:
        sweep: yields the tiles.
        rank: of the wanted magnitude.
        low: least magnitude that is gathered.
        high: greatest one.
        most: how many may be gathered; when there are more, None is returned.

    Returns:
        The magnitude as a scalar tensor, and how many magnitudes equal to it rank above it; or None.
    """
    below = gathered = 0
    found: list[np.ndarray[tuple[int], np.dtype[np.floating]]] = []
    for tile in sweep():
        magnitude = tile.abs().reshape(-1).numpy()
        under = np.less(magnitude, magnitude.dtype.type(low))
        inside = np.less_equal(magnitude, magnitude.dtype.type(high))
        below += int(np.count_nonzero(under))
        np.not_equal(inside, under, out=inside)
        found.append(magnitude[np.flatnonzero(inside)])
        gathered += len(found[-1])
        if below >= rank or gathered > most:
            return None
    if rank > below + gathered:
        return None
    between = np.concatenate(found)
    place = rank - below - 1
    between.partition(place)
    level = between[place]
    above = int(np.count_nonzero(between <= level)) - place - 1
    return torch.tensor(level), above


class Bracket:
    """Where the level of a slowly changing kernel is looked for: around the last one, as wide as it has moved.

    It is a hint alone: a level that lies elsewhere is found in another way, and is the same.
    """

    def __init__(self) -> None:
        self._level = math.nan
        self._width = _FIRST

    def range(self) -> tuple[float, float] | None:
        """Least and greatest magnitude to look between; None before a first level."""
        if not 0 < self._level < math.inf:
            return None
        return self._level * (1 - self._width), self._level * (1 + self._width)

    def note(self, level: float) -> None:
        """Take in a level that was found."""
        if 0 < self._level < math.inf:
            moved = abs(level - self._level) / self._level
            self._width = min(_MOST, max(_LEAST, _AHEAD * moved)) if math.isfinite(moved) else _MOST
        self._level = level
