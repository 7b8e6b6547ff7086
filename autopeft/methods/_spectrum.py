"""Energies of a matrix along its best directions, for first-order gains."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["captured", "energy", "squared_singular_values"]


def squared_singular_values(matrix: Tensor) -> Tensor:
    """Squared singular values of a matrix, decreasing, float64, shape (min(rows, columns),).

    They are the eigenvalues of the smaller Gram matrix, which costs what a singular value decomposition in float32
    does and is exact to float64's rounding of the largest one: what is wanted is the squares.
    """
    m = matrix.detach().to(device="cpu", dtype=torch.float64)
    if m.shape[0] < m.shape[1]:
        m = m.T
    values: Tensor = torch.linalg.eigvalsh(m.T @ m)
    return values.flip(0).clamp_min(0.0)


def captured(energies: Tensor, sizes: Sequence[int]) -> tuple[float, ...]:
    """Sum of the first `size` energies, for each size; sizes beyond the end capture everything."""
    total = torch.cumsum(energies.to(torch.float64), 0)
    last = len(total) - 1
    return tuple(float(total[min(size - 1, last)]) if last >= 0 else 0.0 for size in sizes)


def energy(signal: Tensor) -> float:
    """Sum of the squares, accumulated in float64."""
    return float(torch.linalg.vector_norm(signal.detach(), dtype=torch.float64) ** 2)
