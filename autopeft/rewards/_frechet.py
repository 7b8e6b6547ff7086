"""The Fréchet distance between Gaussians fitted to features, and its bias."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from autopeft.errors import UsageError
from autopeft.rewards._distance import check_rows

__all__ = ["Extrapolation", "extrapolate", "fid", "frechet", "line", "samples_for"]


def frechet(mean_x: Tensor, cov_x: Tensor, mean_y: Tensor, cov_y: Tensor) -> float:
    """`|m - m'|^2 + tr(S + S' - 2 (S S')^(1/2))`, the squared 2-Wasserstein distance of two Gaussians.

    Heusel et al., 2017, arXiv 1706.08500, equation 6 (Dowson and Landau, 1982). The trace of the square root is the sum
    of the singular values of `S^(1/2) S'^(1/2)`, with square roots by eigen-decomposition: real and not negative by
    construction, where a general matrix square root of a singular product returns complex rounding.

    Args:
        mean_x: (d,).
        cov_x: (d, d), symmetric and positive semi-definite.
        mean_y: (d,).
        cov_y: (d, d).
    """
    root_x, root_y = _root(cov_x.double()), _root(cov_y.double())
    shift = (mean_x.double() - mean_y.double()).square().sum()
    overlap = torch.linalg.svdvals(root_x @ root_y).sum()
    return max(0.0, float(shift + cov_x.double().trace() + cov_y.double().trace() - 2 * overlap))


def fid(x: Tensor, y: Tensor) -> float:
    """The Fréchet distance of Gaussians fitted to two sets of features; covariances are divided by n - 1.

    Where there are fewer samples than features it works with the centred features themselves: with `S = A^T A` and
    `S' = B^T B`, the trace of the root of `S S'` is the sum of the singular values of `A B^T`.

    The estimate is biased upwards by about c / n, with a c that depends on both distributions (Chong and Forsyth, 2020,
    arXiv 1911.07023): compare values of equal n only, or extrapolate.

    Args:
        x: (n, d), n at least 2.
        y: (m, d), m at least 2.

    Raises:
        UsageError: for too few samples, unequal widths, or values that are not finite.
    """
    x, y = check_rows("FID", x, 2), check_rows("FID", y, 2)
    if x.shape[1] != y.shape[1]:
        raise UsageError(f"FID needs features of one width, got {x.shape[1]} and {y.shape[1]}")
    shift = (x.mean(0) - y.mean(0)).square().sum()
    a, b = _factor(x), _factor(y)
    overlap = torch.linalg.svdvals(a @ b.T).sum()
    return max(0.0, float(shift + a.square().sum() + b.square().sum() - 2 * overlap))


@dataclass(frozen=True, slots=True)
class Extrapolation:
    """A straight line through estimates over 1 / n.

    Attributes:
        value: the estimate at infinite n.
        slope: what the estimate at n samples is too large by, times n.
        error: standard error of `value` from the scatter about the line; 0 with two points.
    """

    value: float
    slope: float
    error: float


def extrapolate(x: Tensor, y: Tensor, sizes: tuple[int, ...], seed: int = 0) -> Extrapolation:
    """FID-infinity: FID of random subsets of x against all of y, followed to infinitely many samples of x.

    Chong and Forsyth, 2020, arXiv 1911.07023, section 4. The subsets are drawn without replacement from one seed, so
    that two models compared on equal seeds see equal draws. What y's own number of samples adds stays in the value.

    Args:
        x: generated, (n, d).
        y: real, (m, d).
        sizes: numbers of samples, at least two different ones between 2 and n.
        seed: of the subsets.

    Raises:
        UsageError: for sizes that cannot be drawn, and as `fid`.
    """
    x, y = check_rows("FID", x, 2), check_rows("FID", y, 2)
    if len(set(sizes)) < 2 or min(sizes) < 2 or max(sizes) > len(x):
        raise UsageError(f"extrapolation takes two or more sizes between 2 and {len(x)}, got {sizes}")
    generator = torch.Generator().manual_seed(seed)
    draws = [x[torch.randperm(len(x), generator=generator)[:n]] for n in sizes]
    return line(torch.tensor([1.0 / n for n in sizes]), torch.tensor([fid(d, y) for d in draws], dtype=torch.float64))


def line(at: Tensor, values: Tensor) -> Extrapolation:
    """The least-squares line, at 0."""
    at = at.double()
    middle = at.mean()
    spread = (at - middle).square().sum()
    slope = ((at - middle) * values).sum() / spread
    value = values.mean() - slope * middle
    error = 0.0
    if len(at) > 2:
        rest = (values - value - slope * at).square().sum() / (len(at) - 2)
        error = float((rest * (1 / len(at) + middle.square() / spread)).sqrt())
    return Extrapolation(float(value), float(slope), error)


def samples_for(slope: float, tolerance: float) -> int:
    """Samples at which the bias is no more than a tolerance: the smallest n with `|slope| / n <= tolerance`.

    Raises:
        UsageError: for a tolerance that is not above 0.
    """
    if not tolerance > 0:
        raise UsageError(f"a tolerance must be above 0, got {tolerance}")
    return max(2, math.ceil(abs(slope) / tolerance))


def _root(cov: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh((cov + cov.T) / 2)
    root: Tensor = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    return root


def _factor(x: Tensor) -> Tensor:
    """A matrix (k, d) with `A^T A` the covariance, k the smaller of n and d."""
    centred = (x - x.mean(0)) / math.sqrt(len(x) - 1)
    return _root(centred.T @ centred) if len(x) > x.shape[1] else centred
