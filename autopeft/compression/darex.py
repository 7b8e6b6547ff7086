"""DAREx-q: what the kept entries of a dropped change are divided by, per layer and in closed form."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from autopeft.errors import UsageError

__all__ = ["LayerQ", "Rows", "layer_q", "phi", "row_bound"]

Rows = Literal["signed", "absolute"]
"""How a row's expected change enters the bound: with its sign, as published, or as its absolute value, with which the
bound holds on both sides."""

_FINEST = 1e-3
_CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True, eq=False)
class LayerQ:
    """The divisor of one layer.

    Attributes:
        q: mean of the rows' divisors.
        rows: the divisor of every row that has any change: float64 of shape (changed rows,).
        passed: share of these rows that had passed their optimum when the sweep ended.
    """

    q: float
    rows: NDArray[np.float64]
    passed: float


def phi(drop: float) -> float:
    """`(1 - 2p) / ln((1 - p) / p)`: twice the sub-Gaussian constant of a Bernoulli variable; 1/2 at `p = 1/2`."""
    if abs(drop - 0.5) < 1e-9:
        return 0.5
    return (1 - 2 * drop) / math.log((1 - drop) / drop)


def row_bound(
    q: float,
    sums: NDArray[np.float64],
    squares: NDArray[np.float64],
    drop: float,
    eta: float,
    rows: Rows = "signed",
) -> NDArray[np.float64]:
    """What is minimised over `q`, per row: the exponent of the bound on the change of a layer's output.

    `| eta (1 - (1-p)/q) S + eta^2 phi(p) Q / (4 q^2) + ln(2 / (1 - 0.95)) |` with `S = sum_j c_ij` and
    `Q = sum_j c_ij^2`, where `c_ij` is the change of a weight times the mean of its input (DAREx, arXiv 2410.09344).

    Args:
        q: the divisor.
        sums: `S`, shape (rows,).
        squares: `Q`, shape (rows,).
        drop: probability `p` of being dropped.
        eta: the bound's free parameter.
        rows: see `Rows`.
    """
    first = np.abs(sums) if rows == "absolute" else sums
    bound: NDArray[np.float64] = np.abs(
        eta * (1 - (1 - drop) / q) * first + eta**2 * phi(drop) * squares / (4 * q**2) + math.log(2 / (1 - _CONFIDENCE))
    )
    return bound


def layer_q(
    contributions: Tensor, drop: float, eta: float = 0.45, *, stop: float = 0.8, rows: Rows = "signed"
) -> LayerQ:
    """The divisor of one layer: the mean over its rows of the `q` that minimises the row's bound.

    `q` is swept from `1 - p` towards 1 in steps of 0.001. The sweep ends when a share `stop` of the rows has passed its
    optimum, so that a few rows without one do not decide; the others keep the best they have seen. Rows without any
    change are left out: the released code counts them, which pulls the mean of a layer that is changed in part.

    Args:
        contributions: `c`, change of each weight times the mean of its input, (rows, inputs); a change of the bias is
            one more column.
        drop: probability of being dropped, above 0 and below 1.
        eta: the bound's free parameter, above 0; 0.1 to 0.7 is worth trying.
        stop: see above.
        rows: see `Rows`.

    Raises:
        UsageError: for values outside of these ranges.
    """
    if not 0 < drop < 1:
        raise UsageError(f"drop is the share of entries to drop, above 0 and below 1, got {drop!r}")
    if not (math.isfinite(eta) and eta > 0):
        raise UsageError(f"eta must be above 0, got {eta!r}; values from 0.1 to 0.7 are usual")
    if rows not in get_args(Rows):
        raise UsageError(f"rows must be one of {', '.join(get_args(Rows))}, got {rows!r}")
    exact = contributions.detach().cpu().double().numpy()
    exact = exact[np.any(exact != 0, axis=1)]
    if not len(exact):
        return LayerQ(1 - drop, np.zeros(0), 1.0)
    sums, squares = exact.sum(axis=1), (exact**2).sum(axis=1)
    best = row_bound(1 - drop, sums, squares, drop, eta, rows)
    chosen = np.full(len(exact), 1 - drop)
    passed = np.zeros(len(exact), dtype=bool)
    for q in np.arange(1 - drop + _FINEST, 1.0, _FINEST):
        bound = row_bound(float(q), sums, squares, drop, eta, rows)
        better = bound < best
        passed |= ~better
        chosen[better], best[better] = q, bound[better]
        if passed.mean() >= stop:
            break
    return LayerQ(float(chosen.mean()), chosen, float(passed.mean()))
