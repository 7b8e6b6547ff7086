"""The values that codes of a few bits stand for."""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve_banded
from scipy.special import ndtr, ndtri

from autopeft.errors import UsageError

__all__ = ["MOST_BITS", "lloyd_codes"]

MOST_BITS = 8
_ENOUGH = 1e-13
_MOST_STEPS = 100


@functools.lru_cache(maxsize=MOST_BITS)
def lloyd_codes(bits: int) -> NDArray[np.float64]:
    """The L1-optimal `2^bits` values for a standard normal variable, increasing.

    Each value is the median of the normal distribution within its cell, and cells meet half-way between values: the
    fixed point of Lloyd's iteration with medians, which minimises the mean absolute error. 1 bit: -0.6745 and 0.6745;
    2 bits: +-0.3778 and +-1.2657. From "Revisiting the Parameter Efficiency of Adapters from the Perspective of
    Precision Redundancy" (arXiv 2307.16867).

    Found with Newton's method: Lloyd's own iteration needs some 4^bits steps.

    Args:
        bits: 1 to 8.

    Returns:
        float64 of shape (2^bits,), read-only.

    Raises:
        UsageError: for another number of bits.
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= MOST_BITS:
        raise UsageError(f"bits must be a whole number from 1 to {MOST_BITS}, got {bits!r}")
    half = 2 ** (bits - 1)
    # The negative half alone, where the distribution function is precise. The density of the best values goes as the
    # square root of the distribution's: a normal one with twice the variance.
    codes: NDArray[np.float64] = np.sqrt(2.0) * ndtri((np.arange(half) + 0.5) / (2 * half))
    for _ in range(_MOST_STEPS):
        edges = np.append((codes[1:] + codes[:-1]) / 2, 0.0)
        above = ndtr(edges)
        medians = ndtri((np.append(0.0, above[:-1]) + above) / 2)
        # How a median follows the values on both sides of its cell; the edge at 0 does not move.
        up = _density(edges) / (4 * _density(medians))
        up[-1] = 0.0
        down = np.append(0.0, _density(edges[:-1])) / (4 * _density(medians))
        bands = np.zeros((3, half))
        bands[0, 1:], bands[1], bands[2, :-1] = -up[:-1], 1 - up - down, -down[1:]
        step = solve_banded((1, 1), bands, codes - medians)
        while np.any(np.diff(np.append(codes - step, 0.0)) <= 0):
            step = step / 2
        codes = codes - step
        if np.abs(step).max() < _ENOUGH:
            break
    found = np.concatenate([codes, -codes[::-1]])
    found.flags.writeable = False
    return found


def _density(x: NDArray[np.float64]) -> NDArray[np.float64]:
    found: NDArray[np.float64] = np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)
    return found
