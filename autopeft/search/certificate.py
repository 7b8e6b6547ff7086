"""How much better the best knob setting could still be: a bound with a confidence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopeft.core.space import Knob, Space, Value
from autopeft.errors import UsageError

__all__ = ["Certificate", "certify", "coordinates"]

_LENGTHS = tuple(float(v) for v in np.geomspace(0.1, 3.0, 8))
"""Length scales in units of a knob's range, times the root of the number of knobs; equally likely beforehand."""

_NOISES = (1e-3, 1e-2, 1e-1, 0.5)
"""Variance of the noise as a share of the signal's; equally likely beforehand."""

_CANDIDATES = 128
_PATHS = 400
_JITTER = 1e-7

_Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Certificate:
    """No knob setting is better than the one taken by more than `delta`, at this confidence.

    Attributes:
        delta: the bound, in units of the search metric, at least 0.
        confidence: probability that the bound holds, under the assumptions of `certify`.
        trials: values it rests on.
    """

    delta: float
    confidence: float
    trials: int


def coordinates(space: Space, values: Mapping[str, Value]) -> _Array:
    """A knob setting as a point of the unit cube: one axis per numeric knob, on its own scale, one per choice."""
    return np.array([x for knob in space for x in _axes(knob, values[knob.path])], dtype=np.float64)


def certify(
    points: _Array, values: Sequence[float], chosen: int, confidence: float = 0.9, seed: int = 0
) -> Certificate:
    """Bound what the search has left on the table.

    The values are taken to be a draw of a Gaussian process over the knobs plus independent noise of constant variance.
    Its mean and amplitude are integrated out under flat and Jeffreys' priors, its length scale (one for all knobs) and
    its share of noise on a grid, so that what few trials cannot tell is carried as uncertainty. From the posterior
    whole functions are drawn on a fixed set of points that fills the cube, with the tried ones among them; the bound
    is the quantile of `max f - f(chosen)` at the confidence (the regret whose bound Makarova et al., 2022, "Automatic
    termination for hyperparameter optimization", stop by, here by its posterior and not by confidence bands).

    Assumptions, without which the confidence means nothing: the value is a stationary function of the knobs of Matern
    5/2 smoothness, its noise is Gaussian and alike everywhere, all trials ran at full fidelity, the best setting lies
    in the space, and 128 points of the cube miss its peak by little. A bound about one space says nothing of another.

    Args:
        points: one row per trial, (n, d), in the unit cube, see `coordinates`.
        values: their values, larger is better.
        chosen: row of the setting that is taken.
        confidence: in (0, 1).
        seed: of the draws; equal arguments give equal bounds.

    Raises:
        UsageError: for fewer than 3 trials, or arguments that do not fit each other.
    """
    y = np.asarray(values, dtype=np.float64)
    if len(y) < 3 or points.ndim != 2 or len(points) != len(y):
        raise UsageError(f"a certificate needs at least 3 trials with a point each, got {len(y)} of {len(points)}")
    if not 0 < confidence < 1:
        raise UsageError(f"search.confidence must lie between 0 and 1, got {confidence!r}")
    spread = float(y.std())
    if spread == 0 or points.shape[1] == 0:
        return Certificate(0.0, confidence, len(y))
    rng = np.random.default_rng(seed)
    where = np.concatenate([points, _filling(points.shape[1], seed)])
    gaps = _gaps(points, (y - y.mean()) / spread, where, chosen, rng)
    # The gap at the chosen point itself is 0, so that the quantile is at least 0.
    return Certificate(float(np.quantile(gaps, confidence)) * spread, confidence, len(y))


def _gaps(points: _Array, y: _Array, where: _Array, chosen: int, rng: np.random.Generator) -> _Array:
    """Draws of `max f - f(chosen)`, (paths,)."""
    n, d = points.shape
    models = []
    for length in _LENGTHS:
        prior = _matern(where, length * math.sqrt(d))
        for noise in _NOISES:
            models.append(_posterior(prior[:n, :n] + noise * np.eye(n), prior[:n], prior, y))
    evidence = np.array([m[0] for m in models])
    weights = np.exp(evidence - evidence.max())
    counts = rng.multinomial(_PATHS, weights / weights.sum())
    gaps = []
    for (_, mean, covariance, square), count in zip(models, counts, strict=True):
        if not count:
            continue
        root = np.linalg.cholesky(covariance + _JITTER * np.eye(len(where)))
        # Student's t: the amplitude of each path is a draw of its posterior.
        amplitude = np.sqrt(square / rng.chisquare(n - 1, size=count))
        paths = mean[:, None] + root @ rng.standard_normal((len(where), count)) * amplitude
        gaps.append(paths.max(axis=0) - paths[chosen])
    return np.concatenate(gaps)


def _posterior(k: _Array, cross: _Array, prior: _Array, y: _Array) -> tuple[float, _Array, _Array, float]:
    """Log evidence, mean and covariance (of unit amplitude) at the candidates, and `y' P y`, with a flat mean.

    Rasmussen and Williams, 2006, equations 2.41, 2.42 and 2.45, with the amplitude integrated out under 1 / sigma^2.
    """
    n = len(y)
    factor = np.linalg.cholesky(k)
    ones = np.linalg.solve(factor, np.ones(n))
    z, c = np.linalg.solve(factor, y), np.linalg.solve(factor, cross)
    precision = float(ones @ ones)
    level = float(ones @ z) / precision
    residual = z - level * ones
    square = float(residual @ residual)
    log_evidence = -np.log(np.diag(factor)).sum() - 0.5 * math.log(precision) - 0.5 * (n - 1) * math.log(square)
    mean = level + c.T @ residual
    lack = 1.0 - c.T @ ones
    covariance = prior - c.T @ c + np.outer(lack, lack) / precision
    return float(log_evidence), mean, covariance, square


def _matern(points: _Array, length: float) -> _Array:
    """Matern 5/2 with unit variance between all points; the first rows are those of the trials."""
    squares = (points**2).sum(axis=1)
    r = np.sqrt(np.maximum(squares[:, None] + squares - 2 * points @ points.T, 0.0)) * math.sqrt(5) / length
    found: _Array = (1 + r + r**2 / 3) * np.exp(-r)
    return found


def _filling(d: int, seed: int) -> _Array:
    """Points that fill the unit cube evenly."""
    from scipy.stats import qmc

    found: _Array = np.asarray(qmc.Sobol(d, seed=seed).random(_CANDIDATES), dtype=np.float64)
    return found


def _axes(knob: Knob, value: Value) -> list[float]:
    if knob.choices:
        # Choices lie at distance 1 of each other, as far as the ends of a range.
        return [math.sqrt(0.5) * (value == choice) for choice in knob.choices] if len(knob.choices) > 1 else []
    assert knob.low is not None
    assert knob.high is not None
    assert not isinstance(value, str)
    if knob.low == knob.high:
        return []
    if knob.log:
        return [(math.log(value) - math.log(knob.low)) / (math.log(knob.high) - math.log(knob.low))]
    return [(value - knob.low) / (knob.high - knob.low)]
