"""The minimum of an expensive function of one number."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

__all__ = ["coarse_to_fine"]


def coarse_to_fine(
    objective: Callable[[float], float], low: float, high: float, *, points: int = 6, rounds: int = 3
) -> tuple[float, tuple[tuple[float, float], ...]]:
    """Try evenly spaced points, then again between the neighbours of the best, and so on.

    Args:
        objective: called once per point.
        low: smallest point, always tried.
        high: largest point, always tried.
        points: points of the first round, at least 3; each further round tries `points - 2` new ones.
        rounds: rounds in all.

    Returns:
        The best point (the smallest of equals) and every (point, value), in the order they were tried.
    """
    trace: dict[float, float] = {}
    for _ in range(rounds):
        for point in np.linspace(low, high, points).tolist():
            if not any(abs(point - known) <= 1e-12 for known in trace):
                trace[point] = objective(point)
        ordered = sorted(trace)
        at = min(range(len(ordered)), key=lambda i: (trace[ordered[i]], ordered[i]))
        low, high = ordered[max(at - 1, 0)], ordered[min(at + 1, len(ordered) - 1)]
    best = min(trace, key=lambda point: (trace[point], point))
    return best, tuple(trace.items())
