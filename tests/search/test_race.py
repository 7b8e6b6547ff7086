from __future__ import annotations

import math

import numpy as np
import pytest

from autopeft.errors import UsageError
from autopeft.search.race import compare, keep, seed_deviation, shard_means


def test_shards_take_turns() -> None:
    losses = np.arange(7, dtype=np.float64)
    assert shard_means(losses, 3) == (3.0, 2.5, 3.5)
    assert shard_means(losses[:2], 32) == (0.0, 1.0)


def test_the_deviation_between_seeds_by_hand() -> None:
    # Means differ by 0.2 and 0.4: sqrt((0.04 + 0.16) / 4).
    pairs = [((1.0, 1.0), (1.1, 1.3)), ((0.0, 0.0), (0.4, 0.4))]
    assert seed_deviation(pairs) == pytest.approx(math.sqrt(0.05))
    assert seed_deviation([]) == 0.0


def test_the_bar_by_hand() -> None:
    # Differences 0, 0.2, 0.1, 0.1: mean 0.1, deviation sqrt(0.02 / 3), standard error sqrt(0.02 / 12).
    found = compare((1.0, 1.2, 1.1, 1.1), (1.0, 1.0, 1.0, 1.0), sigma_seed=0.0)
    assert found.difference == pytest.approx(0.1)
    assert found.bar == pytest.approx(1.64 * math.sqrt(0.02 / 12))
    assert found.worse
    seeds = compare((1.0, 1.2, 1.1, 1.1), (1.0, 1.0, 1.0, 1.0), sigma_seed=0.05)
    assert seeds.bar == pytest.approx(1.64 * math.sqrt(0.02 / 12 + 2 * 0.05**2))
    assert not seeds.worse


def test_the_sign_rank_test_on_shards() -> None:
    leader = tuple(1.0 + 0.1 * i for i in range(10))
    worse = tuple(v + 0.01 * (i + 1) for i, v in enumerate(leader))
    found = compare(worse, leader, 0.0, "wilcoxon")
    # All ten differences are above 0: p = 2^-10.
    assert 1 - found.statistic == pytest.approx(2**-10, rel=0.05)
    assert found.worse
    assert not compare(worse, leader, 1.0, "wilcoxon").worse, "the seeds explain it"
    assert not compare(leader, leader, 0.0, "wilcoxon").worse
    assert not compare(leader, worse, 0.0, "wilcoxon").worse


@pytest.mark.parametrize("test", ["normal", "wilcoxon"])
def test_an_equal_candidate_is_dropped_as_seldom_as_the_level_says(test: str) -> None:
    """Two plans of equal expected loss, with noise of shards and of seeds: at most 5 % of races drop one of them."""
    draw = np.random.default_rng(0)
    sigma, dropped = 0.03, 0
    for _ in range(1000):
        one, two = (draw.normal(1.0, 0.1, 32) + sigma * draw.normal() for _ in range(2))
        dropped += compare(tuple(one), tuple(two), sigma, test).worse  # type: ignore[arg-type]
    assert 20 <= dropped <= 70 if test == "normal" else dropped <= 70


def test_without_the_seeds_the_level_would_not_hold() -> None:
    draw = np.random.default_rng(0)
    dropped = 0
    for _ in range(1000):
        one, two = (draw.normal(1.0, 0.1, 32) + 0.03 * draw.normal() for _ in range(2))
        dropped += compare(tuple(one), tuple(two), 0.0).worse
    assert dropped > 100


def test_nobody_is_dropped_for_being_a_little_behind() -> None:
    draw = np.random.default_rng(1)
    common = draw.normal(1.0, 0.3, 32)
    losses = {
        name: tuple(common + shift + draw.normal(0, 0.02, 32))
        for name, shift in (("far", 0.5), ("near", 0.003), ("best", 0.0), ("close", 0.004))
    }
    names, found = keep(losses, sigma_seed=0.01, most=9)
    assert set(names) == {"best", "near", "close"}
    assert found["far"].worse
    # The next rung pays for two: the smaller losses.
    order = sorted(("best", "near", "close"), key=lambda name: np.mean(losses[name]))
    assert keep(losses, 0.01, most=2)[0] == tuple(order[:2])
    assert len(keep(losses, 0.01, most=0)[0]) == 1


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(UsageError, match="paired shards"):
        compare((1.0,), (1.0, 2.0), 0.0)
    with pytest.raises(UsageError, match="at least 0"):
        compare((1.0,), (1.0,), -1.0)
    with pytest.raises(UsageError, match="race_test"):
        compare((1.0,), (1.0,), 0.0, "guess")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="at least one candidate"):
        keep({}, 0.0, 3)
    assert not compare((9.0,), (1.0,), 0.0).worse, "one shard proves nothing"
