from __future__ import annotations

import math

import numpy as np
import pytest

from autopeft.core.space import Knob, Space
from autopeft.errors import UsageError
from autopeft.search.certificate import certify, coordinates


def test_coordinates_by_hand() -> None:
    space = Space(
        (Knob("a", -2, 2), Knob("rate", 1e-4, 1.0, log=True), Knob("kind", choices=("x", "y")), Knob("s", 1, 1))
    )
    point = coordinates(space, {"a": 1, "rate": 1e-2, "kind": "y", "s": 1})
    assert point == pytest.approx([0.75, 0.5, 0.0, math.sqrt(0.5)])
    other = coordinates(space, {"a": 1, "rate": 1e-2, "kind": "x", "s": 1})
    assert np.linalg.norm(point - other) == pytest.approx(1.0)


def _draw(rng: np.random.Generator, trials: int, length: float, noise: float) -> tuple[np.ndarray, np.ndarray, float]:
    """A function of two knobs drawn from a Gaussian process, tried at random places; the regret of the best one."""
    grid = np.stack(np.meshgrid(*[np.linspace(0, 1, 16)] * 2), axis=-1).reshape(-1, 2)
    where = np.concatenate([rng.random((trials, 2)), grid])
    r = np.sqrt(((where[:, None] - where[None]) ** 2).sum(-1)) * math.sqrt(5) / (length * math.sqrt(2))
    k = (1 + r + r**2 / 3) * np.exp(-r)
    f = 3.0 + 0.7 * np.linalg.cholesky(k + 1e-8 * np.eye(len(k))) @ rng.standard_normal(len(k))
    values = f[:trials] + 0.7 * math.sqrt(noise) * rng.standard_normal(trials)
    chosen = int(values.argmax())
    return where[:trials], values, float(f.max() - f[chosen])


def test_the_bound_holds_as_often_as_it_says() -> None:
    """40 synthetic searches with length scales and noise of the grid: a bound of 90 % holds in about nine of ten."""
    rng = np.random.default_rng(0)
    held, bounds = 0, []
    for study in range(40):
        length, noise = (0.2, 0.5, 1.0)[study % 3], (0.01, 0.1)[study % 2]
        points, values, regret = _draw(rng, 12, length, noise)
        found = certify(points, values, int(values.argmax()), 0.9, seed=study)
        held += regret <= found.delta
        bounds.append(found.delta)
    # 90 % of 40 is 36; fewer than 31 has a probability of 0.5 %.
    assert held >= 31
    assert held < 40 or np.median(bounds) < 2.0, "a bound that always holds because it says nothing"


def test_more_trials_and_less_confidence_make_it_smaller() -> None:
    rng = np.random.default_rng(3)
    points, values, _ = _draw(rng, 40, 1.0, 0.01)
    few = certify(points[:6], values[:6], int(values[:6].argmax()))
    many = certify(points, values, int(values.argmax()))
    assert many.delta < 0.6 * few.delta
    assert certify(points, values, int(values.argmax()), 0.5).delta < many.delta
    assert (many.trials, many.confidence) == (40, 0.9)


def test_it_has_the_unit_of_the_values_and_no_origin() -> None:
    rng = np.random.default_rng(4)
    points, values, _ = _draw(rng, 10, 0.5, 0.01)
    one = certify(points, values, 2)
    other = certify(points, 100 * values - 7, 2)
    assert other.delta == pytest.approx(100 * one.delta, rel=1e-6)
    assert certify(points, values, 2) == one


def test_a_bad_choice_is_told() -> None:
    rng = np.random.default_rng(5)
    points, values, _ = _draw(rng, 15, 1.0, 0.001)
    worst, best = int(values.argmin()), int(values.argmax())
    assert certify(points, values, worst).delta > 0.9 * (values[best] - values[worst])


def test_values_that_do_not_differ_leave_nothing() -> None:
    assert certify(np.random.default_rng(0).random((4, 2)), [0.5] * 4, 0).delta == 0.0


@pytest.mark.parametrize(
    ("n", "confidence", "match"),
    [(2, 0.9, "at least 3 trials"), (4, 1.0, "search.confidence must lie between 0 and 1")],
)
def test_what_cannot_be_certified_is_refused(n: int, confidence: float, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        certify(np.zeros((n, 2)), list(range(n)), 0, confidence)
