"""Multinomial logistic regression, run until it has converged."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor

from autopeft.errors import TrainingFailed

__all__ = ["logistic_path"]

_TOLERANCE = 1e-7
_ACCEPTED = 1e-5


def logistic_path(x: Tensor, y: Tensor, penalties: Sequence[float]) -> Iterator[tuple[float, Tensor, Tensor]]:
    """Minimise `mean NLL + penalty / 2 * |W|^2` for decreasing penalties, each from the solution before.

    The intercept is not penalised, so that centred features give the same problem. L-BFGS runs in the eigenbasis of
    their covariance with each axis scaled by the inverse root of its curvature, `eigenvalue / classes + penalty`; the
    penalty is kept in the original coordinates, so that only the path to the minimum changes.

    Args:
        x: features, float64, (n, d).
        y: one-hot labels, float64, (n, classes).
        penalties: positive; walked from the largest.

    Yields:
        Penalty, weight (classes, d), bias (classes,).

    Raises:
        TrainingFailed: when L-BFGS stops before the gradient vanishes.
    """
    n, classes = y.shape
    mean = x.mean(0)
    _, s, Vt = torch.linalg.svd(x - mean, full_matrices=False)
    basis = Vt[s > s[0] * 1e-9]
    z = (x - mean) @ basis.T
    variance = z.square().mean(0)
    weight = torch.zeros(classes, len(basis), dtype=torch.float64)
    bias = torch.zeros(classes, dtype=torch.float64)
    for penalty in sorted(penalties, reverse=True):
        scale = (variance / classes + penalty).rsqrt()
        scaled = z * scale

        def objective(flat: NDArray[np.float64], penalty: float = penalty, scale: Tensor = scale,
                      scaled: Tensor = scaled) -> tuple[float, NDArray[np.float64]]:  # fmt: skip
            theta = torch.from_numpy(flat).reshape(classes, -1)
            logits = scaled @ theta[:, :-1].T + theta[:, -1]
            logs = torch.log_softmax(logits, 1)
            w = theta[:, :-1] * scale
            error = (logs.exp() - y) / n
            gradient = torch.cat([error.T @ scaled + penalty * w * scale, error.sum(0)[:, None]], 1)
            value = -float((logs * y).sum()) / n + penalty / 2 * float(w.square().sum())
            return value, gradient.flatten().numpy()

        start = torch.cat([weight / scale, bias[:, None]], 1).flatten().numpy()
        options = {"maxiter": 5000, "maxfun": 20000, "maxcor": 20, "gtol": _TOLERANCE, "ftol": 0.0}
        found = minimize(objective, start, jac=True, method="L-BFGS-B", options=options)
        # A line search at the limit of float64 reports failure; what counts is the gradient.
        if not math.isfinite(found.fun) or float(np.abs(found.jac).max()) > _ACCEPTED:
            raise TrainingFailed(f"logistic regression with penalty {penalty:g} has not converged: {found.message}")
        theta = torch.from_numpy(found.x.copy()).reshape(classes, -1)
        weight, bias = theta[:, :-1] * scale, theta[:, -1]
        full = weight @ basis
        yield penalty, full, bias - full @ mean
