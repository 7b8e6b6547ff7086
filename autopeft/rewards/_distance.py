"""Distances between many vectors and many others, without their whole matrix."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from autopeft.errors import UsageError

__all__ = ["Metric", "check_rows", "distances", "nearest"]

Metric = Literal["l2", "cosine", "abs_cosine"]
"""`|x - y|`, `1 - cos(x, y)`, or `1 - |cos(x, y)|` as the Kaggle competition that MiFID comes from has it."""

_CELLS = 1 << 22
"""Distances that are held at once."""


def check_rows(what: str, features: Tensor, least: int = 1) -> Tensor:
    """The rows in float64 on the CPU, flattened to (n, d).

    Raises:
        UsageError: for too few rows, or values that are not finite.
    """
    if features.ndim < 2 or len(features) < least:
        raise UsageError(
            f"{what} needs at least {least} rows of numbers, got a tensor of shape {tuple(features.shape)}"
        )
    rows = features.detach().flatten(1).to(device="cpu", dtype=torch.float64)
    broken = int((~torch.isfinite(rows).all(dim=1)).sum())
    if broken:
        raise UsageError(f"{what}: {broken} of {len(rows)} rows hold NaN or infinite values")
    return rows


def nearest(x: Tensor, y: Tensor, metric: Metric = "l2") -> tuple[Tensor, Tensor]:
    """Of every row of x the nearest row of y; the first of several.

    Args:
        x: (n, ...), flattened to (n, d).
        y: (m, ...), flattened to (m, d).
        metric: the distance.

    Returns:
        Distances, float64 of shape (n,), and the rows' numbers, int64 of shape (n,).

    Raises:
        UsageError: for empty, misshapen or not finite inputs.
    """
    found = [block.min(dim=1) for block in distances(x, y, metric)]
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])


def distances(x: Tensor, y: Tensor, metric: Metric) -> Iterator[Tensor]:
    """The distances of a few rows of x at a time to all rows of y, each float64 of shape (rows, m).

    Differences are taken directly for `l2`: the expansion into products cannot tell near rows from equal ones.
    """
    x, y = check_rows("a distance", x), check_rows("a distance", y)
    if x.shape[1] != y.shape[1]:
        raise UsageError(f"rows of {x.shape[1]} and of {y.shape[1]} numbers have no distance")
    if metric != "l2":
        x, y = (rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min(1e-300) for rows in (x, y))
    step = max(1, _CELLS // len(y))
    for part in (x[i : i + step] for i in range(0, len(x), step)):
        if metric == "l2":
            yield torch.cdist(part, y, compute_mode="donot_use_mm_for_euclid_dist")
        else:
            cosine = part @ y.T
            yield 1.0 - (cosine.abs() if metric == "abs_cosine" else cosine)
