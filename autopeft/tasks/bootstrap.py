"""Percentile bootstrap intervals of a mean."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor

from autopeft.errors import UsageError

__all__ = ["Values", "bootstrap_interval", "paired_interval"]

Values = Sequence[float] | Tensor | npt.NDArray[np.floating]

_CHUNK = 4_000_000
"""Indices drawn at once: about 32 MB."""


def bootstrap_interval(values: Values, level: float = 0.95, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean (Efron and Tibshirani 1993, chapter 13).

    Args:
        values: one number per sample, such as 1.0 for a hit and 0.0 for a miss.
        level: coverage asked for, between 0 and 1.
        draws: resamples, each as large as `values`.
        seed: the same seed gives the same interval.

    Returns:
        The `(1 - level) / 2` and `(1 + level) / 2` quantiles of the resampled means.

    Raises:
        UsageError: without values, or for a level or number of draws that makes no sense.
    """
    data = _vector(values)
    if not 0 < level < 1:
        raise UsageError(f"the level of an interval lies between 0 and 1, got {level}")
    if draws < 1:
        raise UsageError(f"a bootstrap needs at least 1 draw, got {draws}")
    generator = np.random.default_rng(seed)
    n = len(data)
    rows = max(1, _CHUNK // n)
    means = [
        data[generator.integers(0, n, size=(min(rows, draws - start), n))].mean(axis=1)
        for start in range(0, draws, rows)
    ]
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_interval(
    ours: Values, theirs: Values, level: float = 0.95, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean difference `ours - theirs` on the same samples, in the same order.

    Resampling pairs keeps what the two have in common out of the interval.

    Raises:
        UsageError: when the two differ in length, and as `bootstrap_interval`.
    """
    first, second = _vector(ours), _vector(theirs)
    if len(first) != len(second):
        raise UsageError(
            f"a paired comparison needs the same samples on both sides, got {len(first)} and {len(second)}"
        )
    return bootstrap_interval(first - second, level, draws, seed)


def _vector(values: Values) -> npt.NDArray[np.float64]:
    data = values.detach().cpu().numpy() if isinstance(values, Tensor) else values
    vector = np.asarray(data, dtype=np.float64)
    if vector.ndim != 1 or not len(vector):
        raise UsageError(f"a bootstrap needs a list of at least one number, got shape {vector.shape}")
    return vector
