"""What is said of many cells together: exact sign flips, Holm's correction, bootstrap over cells, seeds and samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np

__all__ = ["bootstrap", "gap_closed", "grouped_means", "holm", "sign_flip", "unpacked"]

Matrix = np.ndarray
"""Differences of correctness, shape (seeds, samples): 1 where only the first is right, -1 where only the second is."""


def unpacked(rows: Sequence[str], n: int) -> np.ndarray:
    """Whether each of n samples was classified correctly, (seeds, n) of 0 and 1, from hexadecimal packed bits."""
    bits = [np.unpackbits(np.frombuffer(bytes.fromhex(row), dtype=np.uint8), count=n) for row in rows]
    return np.stack(bits).astype(float)


def sign_flip(differences: Sequence[float]) -> float:
    """Two-sided p-value of a mean of 0 when the sign of every difference is as likely as the other; all signs tried.

    With n cells no p-value is below `2 ** (1 - n)`.
    """
    values = np.asarray(differences, dtype=float)
    if len(values) > 20:
        raise ValueError(f"{len(values)} differences have too many sign patterns to try all; 20 at most")
    signs = np.array(list(product((1.0, -1.0), repeat=len(values))))
    means = np.abs(signs @ values)
    return float(np.mean(means >= abs(values.sum()) - 1e-12))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down adjusted p-values (1979)."""
    adjusted: dict[str, float] = {}
    running, m = 0.0, len(p_values)
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        running = max(running, min(1.0, (m - rank) * p))
        adjusted[name] = running
    return adjusted


def grouped_means(groups: Mapping[str, Sequence[float]]) -> tuple[float, float]:
    """The two means of results over tasks in groups, which published tables of VTAB mix.

    Args:
        groups: results of the tasks of every group.

    Returns:
        The mean of the groups' means (SPT's tables and SNELL's table 1), and the mean over all tasks (SNELL's text).
    """
    values = {name: np.asarray(results, dtype=float) for name, results in groups.items()}
    return float(np.mean([v.mean() for v in values.values()])), float(np.concatenate(list(values.values())).mean())


def bootstrap(cells: Sequence[Matrix], draws: int = 4000, over_cells: bool = True) -> tuple[float, float, float]:
    """Mean difference over cells and its 95 % interval, resampling cells, then seeds and samples within each.

    Returns:
        (mean, low, high). One cell, or `over_cells=False`: seeds and samples alone.
    """
    rng = np.random.default_rng(0)
    mean = float(np.mean([cell.mean() for cell in cells]))
    means = np.empty(draws)
    for draw in range(draws):
        chosen = rng.integers(len(cells), size=len(cells)) if over_cells else np.arange(len(cells))
        total = 0.0
        for index in chosen:
            cell = cells[index]
            seeds, samples = cell.shape
            weights = np.bincount(rng.integers(samples, size=samples), minlength=samples)
            total += float(cell[rng.integers(seeds, size=seeds)].mean(axis=0) @ weights) / samples
        means[draw] = total / len(chosen)
    low, high = np.quantile(means, (0.025, 0.975))
    return mean, float(low), float(high)


def gap_closed(gains: Sequence[Matrix], gaps: Sequence[Matrix], draws: int = 4000) -> tuple[float, float, float]:
    """Sum of gains over the probe by sum of gaps, and its 95 % interval; both are resampled together.

    Args:
        gains: contender minus probe, per cell.
        gaps: full fine-tuning minus probe, per cell, the same seeds and samples.
        draws: of the bootstrap.
    """
    rng = np.random.default_rng(0)
    share = sum(g.mean() for g in gains) / sum(g.mean() for g in gaps)
    shares = np.empty(draws)
    for draw in range(draws):
        above = below = 0.0
        for index in rng.integers(len(gains), size=len(gains)):
            seeds, samples = gains[index].shape
            rows = rng.integers(seeds, size=seeds)
            weights = np.bincount(rng.integers(samples, size=samples), minlength=samples) / samples
            above += float(gains[index][rows].mean(axis=0) @ weights)
            below += float(gaps[index][rows].mean(axis=0) @ weights)
        shares[draw] = above / below if below > 0 else np.nan
    low, high = np.nanquantile(shares, (0.025, 0.975))
    return float(share), float(low), float(high)
