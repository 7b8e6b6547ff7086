"""Ridge regression in closed form, for any penalty at once."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Ridge"]


class Ridge:
    """Ridge regressions with a free intercept on the same samples, for any penalty.

    With X and Y centred and `X^T X = V L V^T`: `W^T = V (L + alpha)^-1 V^T X^T Y`; with fewer samples than features
    `X X^T = U L U^T` and `W^T = X^T U (L + alpha)^-1 U^T Y`.
    """

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self._mean, self._level = x.mean(0), y.mean(0)
        x, y = x - self._mean, y - self._level
        if x.shape[0] < x.shape[1]:
            values, vectors = torch.linalg.eigh(x @ x.T)
            self._basis, self._target = x.T @ vectors, vectors.T @ y
        else:
            values, vectors = torch.linalg.eigh(x.T @ x)
            self._basis, self._target = vectors, vectors.T @ (x.T @ y)
        self._values = values.clamp(min=0)

    def solve(self, alpha: float) -> tuple[Tensor, Tensor]:
        """Weight (outputs, features) and bias (outputs,)."""
        weight = (self._basis @ (self._target / (self._values + alpha)[:, None])).T
        return weight, self._level - weight @ self._mean
