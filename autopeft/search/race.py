"""Which candidates stay in a race: paired comparison on shared validation shards."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from autopeft.errors import UsageError

__all__ = ["SHARDS", "Comparison", "RaceTest", "compare", "keep", "seed_deviation", "shard_means"]

RaceTest = Literal["normal", "wilcoxon"]

SHARDS = 32
"""Validation shards at most; sample i belongs to shard `i mod 32`, for every candidate alike."""

_Z = 1.64
"""One-sided 5 % of the normal distribution."""

_P = 0.05


@dataclass(frozen=True, slots=True)
class Comparison:
    """A candidate against the leader.

    Attributes:
        difference: mean loss of the candidate minus the leader's, over the shards, in nats.
        bar: what the difference must exceed for the candidate to be dropped; of Wilcoxon's test the p-value's limit.
        statistic: what is held against the bar: the difference, or 1 minus the p-value.
        worse: whether the candidate is dropped.
    """

    difference: float
    bar: float
    statistic: float
    worse: bool


def shard_means(losses: NDArray[np.float64], shards: int = SHARDS) -> tuple[float, ...]:
    """Mean loss per shard.

    Args:
        losses: per sample, in file order, (n,).
        shards: number of shards; n when there are fewer samples.
    """
    count = min(shards, len(losses))
    return tuple(float(losses[place::count].mean()) for place in range(count))


def seed_deviation(pairs: Sequence[tuple[Sequence[float], Sequence[float]]]) -> float:
    """Standard deviation of a candidate's mean loss between seeds, pooled over pairs of trainings of one plan.

    Two trainings that differ in the seed alone have means that differ with variance `2 sigma^2`; the estimate is
    `sqrt(sum d^2 / (2 k))` over k pairs. Both are measured on the same samples, so that the noise of the validation set
    mostly cancels. 0 without pairs.

    Args:
        pairs: shard means of the two trainings of each plan.
    """
    if not pairs:
        return 0.0
    squares = [float(np.mean(a) - np.mean(b)) ** 2 for a, b in pairs]
    return math.sqrt(sum(squares) / (2 * len(squares)))


def compare(
    candidate: Sequence[float], leader: Sequence[float], sigma_seed: float, test: RaceTest = "normal"
) -> Comparison:
    """Whether a candidate is worse than the leader beyond what validation set and seed explain.

    `normal`: dropped only if the paired difference exceeds `1.64 sqrt(SE_val^2 + 2 sigma_seed^2)`, with `SE_val` the
    standard error of the shards' differences; the seeds of both sides count. `wilcoxon`: dropped if the signed-rank
    test on the shards (Wilcoxon, 1945; zeros are split) says at 5 % that the differences exceed
    `1.64 sqrt(2) sigma_seed`, what seeds alone explain: shards share their seed and cannot know of it.

    Args:
        candidate: mean loss per shard.
        leader: the same of the best candidate, on the same shards.
        sigma_seed: deviation between seeds, see `seed_deviation`.
        test: which test.

    Raises:
        UsageError: for different shards, a negative deviation or an unknown test.
    """
    if len(candidate) != len(leader) or not candidate:
        raise UsageError(
            f"paired shards are needed, got {len(candidate)} of the candidate, {len(leader)} of the leader"
        )
    if not sigma_seed >= 0:
        raise UsageError(f"the deviation between seeds must be at least 0, got {sigma_seed!r}")
    if test not in get_args(RaceTest):
        raise UsageError(f"search.race_test must be one of {', '.join(get_args(RaceTest))}, got {test!r}")
    differences = np.asarray(candidate, dtype=np.float64) - np.asarray(leader, dtype=np.float64)
    mean, count = float(differences.mean()), len(differences)
    seeds = 2 * sigma_seed**2
    if test == "wilcoxon":
        p = _wilcoxon(differences - _Z * math.sqrt(seeds))
        return Comparison(mean, 1 - _P, 1 - p, p < _P)
    error = float(differences.std(ddof=1)) / math.sqrt(count) if count > 1 else math.inf
    bar = _Z * math.sqrt(error**2 + seeds)
    return Comparison(mean, bar, mean, mean > bar)


def keep(
    losses: Mapping[str, Sequence[float]], sigma_seed: float, most: int, test: RaceTest = "normal"
) -> tuple[tuple[str, ...], dict[str, Comparison]]:
    """Who goes on to the next rung.

    Nobody is dropped for being behind unless it is so significantly; of those that are not, as many go on as the next
    rung can pay for, the smaller loss first.

    Args:
        losses: name of each candidate to its mean loss per shard.
        sigma_seed: deviation between seeds.
        most: candidates that the next rung can pay for.
        test: which test.

    Returns:
        The names that go on, best first, and every candidate's comparison with the leader.

    Raises:
        UsageError: without candidates.
    """
    if not losses:
        raise UsageError("a race needs at least one candidate whose training finished")
    order = sorted(losses, key=lambda name: float(np.mean(losses[name])))
    found = {name: compare(losses[name], losses[order[0]], sigma_seed, test) for name in order}
    return tuple(name for name in order if not found[name].worse)[: max(1, most)], found


def _wilcoxon(differences: NDArray[np.float64]) -> float:
    from scipy.stats import wilcoxon

    if not differences.any():
        return 1.0
    with warnings.catch_warnings():
        # Ties make scipy fall back to the normal approximation, which it says aloud.
        warnings.simplefilter("ignore")
        found: Any = wilcoxon(differences, alternative="greater", zero_method="zsplit")
    return float(found.pvalue)
