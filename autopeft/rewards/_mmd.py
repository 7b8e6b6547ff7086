"""Maximum mean discrepancies between two sets of features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from autopeft.errors import UsageError
from autopeft.rewards._distance import check_rows

__all__ = ["Estimate", "gaussian_mmd", "polynomial_mmd"]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number and how sure it is.

    Attributes:
        value: the estimate.
        error: its standard error.
    """

    value: float
    error: float


def polynomial_mmd(x: Tensor, y: Tensor, degree: int = 3) -> Estimate:
    """KID: the unbiased squared MMD with the kernel `(x . y / d + 1)^degree`.

    Binkowski et al., 2018, arXiv 1801.01401, section 4. Expectation 0 for equal distributions at every n, so that it
    may be negative, and values at different n may be compared. All samples are used at once; the standard error is the
    jackknife's over single samples, of x and of y apart: about a third too large between equal distributions.

    Args:
        x: (n, d), n at least 3.
        y: (m, d), m at least 3.
        degree: of the kernel.

    Raises:
        UsageError: for too few samples, unequal widths, or values that are not finite.
    """
    x, y = _pair("KID", x, y, 3)
    d = x.shape[1]
    return _unbiased(*(((a @ b.T) / d + 1).pow(degree) for a, b in ((x, x), (y, y), (x, y))))


def gaussian_mmd(x: Tensor, y: Tensor, sigma: float, *, normalise: bool = True, unbiased: bool = False) -> Estimate:
    """The squared MMD with the kernel `exp(-|x - y|^2 / (2 sigma^2))`.

    Jayasumana et al., 2024, arXiv 2401.09603 (CMMD), with `sigma` 10 on features of unit length, and the estimator of
    least variance, which counts a sample's kernel with itself: never negative, biased upwards by about 1 / n.

    Args:
        x: (n, d), n at least 3.
        y: (m, d), m at least 3.
        sigma: width of the kernel, above 0.
        normalise: scale every sample to unit length first.
        unbiased: leave a sample's kernel with itself out.

    Raises:
        UsageError: for too few samples, unequal widths, a width of 0, or values that are not finite.
    """
    if not sigma > 0:
        raise UsageError(f"the width of a Gaussian kernel must be above 0, got {sigma}")
    x, y = _pair("CMMD", x, y, 3)
    if normalise:
        x, y = (r / torch.linalg.vector_norm(r, dim=1, keepdim=True).clamp_min(1e-300) for r in (x, y))
    kernels = []
    for a, b in ((x, x), (y, y), (x, y)):
        squares = a.square().sum(1)[:, None] + b.square().sum(1)[None] - 2 * a @ b.T
        kernels.append(torch.exp(squares.clamp_min(0) / (-2 * sigma * sigma)))
    found = _unbiased(*kernels)
    if unbiased:
        return found
    xx, yy, xy = kernels
    return Estimate(max(0.0, float(xx.mean() + yy.mean() - 2 * xy.mean())), found.error)


def _pair(what: str, x: Tensor, y: Tensor, least: int) -> tuple[Tensor, Tensor]:
    x, y = check_rows(what, x, least), check_rows(what, y, least)
    if x.shape[1] != y.shape[1]:
        raise UsageError(f"{what} needs features of one width, got {x.shape[1]} and {y.shape[1]}")
    return x, y


def _unbiased(xx: Tensor, yy: Tensor, xy: Tensor) -> Estimate:
    """The U-statistic of three kernel matrices, and its jackknife error in closed form.

    Without sample i of x the within-sum loses row i twice, the cross-sum its row once; likewise for y.
    """
    n, m = xy.shape
    rows_x, rows_y = xx.sum(1) - xx.diagonal(), yy.sum(1) - yy.diagonal()
    within_x, within_y, cross = rows_x.sum(), rows_y.sum(), xy.sum()
    mean_x, mean_y, mean_xy = within_x / (n * (n - 1)), within_y / (m * (m - 1)), cross / (n * m)
    value = mean_x + mean_y - 2 * mean_xy
    no_x = (within_x - 2 * rows_x) / ((n - 1) * (n - 2)) + mean_y - 2 * (cross - xy.sum(1)) / ((n - 1) * m)
    no_y = mean_x + (within_y - 2 * rows_y) / ((m - 1) * (m - 2)) - 2 * (cross - xy.sum(0)) / (n * (m - 1))
    variance = sum((len(v) - 1) / len(v) * (v - v.mean()).square().sum() for v in (no_x, no_y))
    return Estimate(float(value), float(torch.as_tensor(variance).sqrt()))
