import numpy as np
import pytest

from autopeft.pipeline.finish import paired_interval


def test_equal_contenders_have_an_interval_of_zero_width():
    a = [np.array([True, False, True, True])] * 3
    assert paired_interval(a, a) == (0.0, 0.0)


def test_always_better_by_the_same_share():
    first, second = [np.ones(50, bool)] * 3, [np.zeros(50, bool)] * 3
    assert paired_interval(first, second) == (1.0, 1.0)


def test_the_interval_has_the_width_of_the_normal_approximation():
    # One seed, n samples, differences +1 with probability .2, -1 with .1, else 0:
    # mean .1, variance .3 - .01 = .29, so the 95 % half-width is 1.96 sqrt(.29 / n).
    n = 4000
    difference = np.repeat([1, -1, 0], [n // 5, n // 10, n - n // 5 - n // 10])
    first, second = difference == 1, difference == -1
    low, high = paired_interval([first], [second])
    half = 1.96 * (0.29 / n) ** 0.5
    assert low == pytest.approx(0.1 - half, abs=0.15 * half)
    assert high == pytest.approx(0.1 + half, abs=0.15 * half)


def test_seeds_that_disagree_widen_the_interval():
    n = 1000
    rng = np.random.default_rng(1)
    base = rng.random(n) < 0.8
    better, worse = base | (rng.random(n) < 0.3), base & (rng.random(n) < 0.7)
    agreeing = paired_interval([better, better], [base, base])
    disagreeing = paired_interval([better, worse], [base, base])
    assert disagreeing[1] - disagreeing[0] > 3 * (agreeing[1] - agreeing[0])
