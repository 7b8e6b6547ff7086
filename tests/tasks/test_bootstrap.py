from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import norm

from autopeft.errors import UsageError
from autopeft.tasks.bootstrap import bootstrap_interval, paired_interval


def test_interval_of_a_large_sample_is_the_normal_one() -> None:
    hits = np.zeros(2000)
    hits[:1500] = 1
    low, high = bootstrap_interval(hits, draws=4000)
    half = norm.ppf(0.975) * np.sqrt(0.75 * 0.25 / 2000)
    assert low == pytest.approx(0.75 - half, abs=0.002)
    assert high == pytest.approx(0.75 + half, abs=0.002)


def test_interval_covers_the_mean_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for trial in range(300):
        low, high = bootstrap_interval(generator.normal(size=60), level=0.8, draws=300, seed=trial)
        covered += low <= 0 <= high
    # Binomial(300, .8) has a standard deviation of 2.3 %; small samples cover a little less than nominal.
    assert 0.70 <= covered / 300 <= 0.88


def test_interval_of_equal_values_is_a_point() -> None:
    assert bootstrap_interval([0.25] * 9) == (0.25, 0.25)


def test_seed_decides_and_chunks_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.arange(50.0)
    assert bootstrap_interval(values, seed=1) == bootstrap_interval(list(range(50)), seed=1)
    assert bootstrap_interval(values, seed=1) != bootstrap_interval(values, seed=2)
    whole = bootstrap_interval(values, seed=1)
    monkeypatch.setattr("autopeft.tasks.bootstrap._CHUNK", 50 * 7)
    assert bootstrap_interval(values, seed=1) == whole


def test_pairs_take_the_common_part_out() -> None:
    base = np.random.default_rng(0).normal(size=100) * 10
    low, high = paired_interval(base + 0.5, base)
    assert low == pytest.approx(0.5)
    assert high == pytest.approx(0.5)
    assert paired_interval(base, base + 0.5) == pytest.approx((-0.5, -0.5))


@pytest.mark.parametrize("settings", [{"level": 0.0}, {"level": 1.0}, {"draws": 0}])
def test_bad_settings_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        bootstrap_interval([1.0, 2.0], **settings)  # type: ignore[arg-type]


def test_bad_values_are_refused() -> None:
    with pytest.raises(UsageError, match="at least one number"):
        bootstrap_interval([])
    with pytest.raises(UsageError, match="got 2 and 3"):
        paired_interval([1.0, 2.0], [1.0, 2.0, 3.0])
