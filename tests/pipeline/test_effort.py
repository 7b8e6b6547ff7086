from types import SimpleNamespace

import pytest

from autopeft.pipeline.contenders import Candidate, Group
from autopeft.pipeline.effort import Effort, finish_seconds, plan_effort
from autopeft.pipeline.tune import learning_rate_scales


def test_small_data_is_seen_whole():
    assert Effort.of(15, 500, 10) == Effort(15, 5)
    assert Effort.of(2, 9_999, 10) == Effort(2, 1)


def test_large_data_is_seen_in_parts():
    # A tenth of 50,000 is 5,000: 500 per class.
    assert Effort.of(6, 50_000, 10) == Effort(60, 6, 0.1)
    # 50 per class of 100 classes are 5,000 of 12,000: two parts.
    assert Effort.of(6, 12_000, 100) == Effort(12, 1, 0.5)
    # 1,000 classes need all of 20,000.
    assert Effort.of(6, 20_000, 1_000) == Effort(6, 1, 1.0)


@pytest.mark.parametrize(("tier", "epochs"), [(None, 12), ("default", 12), ("race", 12), ("search", 4)])
def test_trials_of_a_searched_tier_are_short(tier, epochs):
    assert Effort.of(12, 800, 10).of_trials(tier).epochs == epochs


def test_learning_rates_are_half_a_decade_apart():
    assert learning_rate_scales(1) == (1.0,)
    assert learning_rate_scales(2) == pytest.approx((10**-0.5, 1))
    assert learning_rate_scales(5) == pytest.approx((0.1, 10**-0.5, 1, 10**0.5, 10))


def fake(limit, epochs=15):
    task = SimpleNamespace(sizes={"inner": 500, "outer": 400}, classes=("a", "b"))
    search = SimpleNamespace(time_limit=limit, tries=2, trials=10, seeds=3)
    return SimpleNamespace(task=task), SimpleNamespace(search=search, train=SimpleNamespace(epochs=epochs))


def groups(n_options=3):
    allocation = type("Plan", (), {"__len__": lambda self: n_options})()
    return (Group("one", "baseline", (Candidate("a", allocation), Candidate("b", allocation))),)


def test_without_a_limit_nothing_is_measured():
    prepared, study = fake(None)
    assert plan_effort(prepared, study, groups(), 0.0) == Effort(15, 5)


@pytest.mark.parametrize("limit", [60.0, 150.0, 1e9])
def test_the_plan_fits_the_limit_at_the_measured_speed(monkeypatch, limit):
    monkeypatch.setattr("autopeft.pipeline.effort.measure_speed", lambda *args: 0.002)
    prepared, study = fake(limit)
    effort = plan_effort(prepared, study, groups(), 10.0)
    # One group of two variants at two rates: four short runs and two full ones, or two and one; ten trials at 0.6; nine
    # at the end.
    e, r, runs = effort.epochs, effort.rung, 2 * (effort.tries or 2)
    full = 1 if effort.tries == 1 else 2
    samples = (runs * r + full * e + 10 * e * 0.6) * 500 + 9 * e * 900
    assert effort.planned_seconds == pytest.approx(samples * 0.002)
    assert effort.planned_seconds <= 0.8 * (limit - 10) or effort.epochs == 2
    assert effort.tries == (1 if limit == 60.0 else None)
    if limit == 1e9:
        assert effort.epochs == 15
    assert finish_seconds(prepared, study, effort) == pytest.approx(9 * e * 900 * 0.002)
