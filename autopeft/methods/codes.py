"""Codes of a few bits: the values that they stand for, and their bytes."""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve_banded
from scipy.special import ndtr, ndtri

from autopeft.errors import UsageError

__all__ = ["MOST_BITS", "kept_energy", "lloyd_codes", "pack", "unpack"]

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


@functools.lru_cache(maxsize=MOST_BITS)
def kept_energy(bits: int) -> float:
    """The share of a vector's energy that lies along its codes, when its entries are standard normal.

    The squared cosine between `w` and its nearest codes `q`, `E[w q]^2 / (E[w^2] E[q^2])`: 2 / pi for 1 bit.

    Raises:
        UsageError: for another number of bits than 1 to 8.
    """
    codes = lloyd_codes(bits)
    edges = np.concatenate([[-np.inf], (codes[1:] + codes[:-1]) / 2, [np.inf]])
    density, below = _density(edges), ndtr(edges)
    along = float(codes @ (density[:-1] - density[1:]))
    return along**2 / float(codes**2 @ np.diff(below))


def pack(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Codes of `bits` bits each as bytes, the first in the highest bits; the last byte is filled with zeros.

    Args:
        codes: shape (n,), each below 2^bits.
        bits: 1 to 8.
    """
    flat = np.unpackbits(codes.reshape(-1, 1), axis=1)[:, 8 - bits :]
    return np.packbits(flat.reshape(-1))


def unpack(packed: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.uint8]:
    """The first `count` codes that `pack` wrote, shape (count,)."""
    flat = np.unpackbits(packed, count=count * bits).reshape(count, bits)
    whole = np.zeros((count, 8), dtype=np.uint8)
    whole[:, 8 - bits :] = flat
    return np.packbits(whole, axis=1).reshape(count)


def _density(x: NDArray[np.float64]) -> NDArray[np.float64]:
    found: NDArray[np.float64] = np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)
    return found
