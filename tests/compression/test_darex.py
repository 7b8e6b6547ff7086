import math

import numpy as np
import pytest
import torch

from autopeft.compression.darex import layer_q, phi, row_bound
from autopeft.errors import UsageError


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def brute(row, drop, eta, rows):
    """The bound in plain Python, at every point of a fine grid."""
    total, squares = sum(row), sum(c * c for c in row)
    total = abs(total) if rows == "absolute" else total
    spread = (1 - 2 * drop) / math.log((1 - drop) / drop)

    def bound(q):
        mean = eta * (1 - (1 - drop) / q) * total
        return abs(mean + eta**2 * spread * squares / (4 * q * q) + math.log(2 / 0.05))

    return min(np.arange(1 - drop, 1, 1e-4).tolist(), key=bound)


@pytest.mark.parametrize("rows", ["signed", "absolute"])
@pytest.mark.parametrize(("drop", "scale", "shift"), [(0.9, 0.5, 0.4), (0.9, 0.3, -0.5), (0.99, 0.1, 0.3), (0.8, 2, 0)])
def test_every_row_takes_the_minimum_of_its_bound(drop, scale, shift, rows):
    c = scale * random(12, 20) + shift
    found = layer_q(c, drop, 0.45, stop=1.1, rows=rows)
    expected = [brute(row, drop, 0.45, rows) for row in c.tolist()]
    np.testing.assert_allclose(found.rows, expected, atol=1.01e-3)
    assert found.q == pytest.approx(float(np.mean(found.rows)))


def test_the_closed_form_in_one_over_q():
    """With u = 1/q the bound without its absolute value is a parabola, with its minimum at 2 (1-p) S / (eta phi Q)."""
    drop, eta, total = 0.9, 0.45, 3.0
    c = torch.full((1, 10), total / 10, dtype=torch.float64)
    squares = float((c**2).sum())
    u = 2 * (1 - drop) * total / (eta * phi(drop) * squares)
    assert layer_q(c, drop, eta, stop=1.1).q == pytest.approx(min(1 / u, 0.999), abs=1e-3)
    assert 0.1 < 1 / u < 1


def test_the_bound_by_hand():
    # S = 2, Q = 4, p = 1/2, eta = 1, q = 1: 1 * (1 - 1/2) * 2 + 1/2 * 4 / 4 + ln 40.
    found = row_bound(1.0, np.array([2.0, -2.0]), np.array([4.0, 4.0]), 0.5, 1.0)
    np.testing.assert_allclose(found, [1 + 0.5 + math.log(40), -1 + 0.5 + math.log(40)])
    absolute = row_bound(1.0, np.array([2.0, -2.0]), np.array([4.0, 4.0]), 0.5, 1.0, "absolute")
    np.testing.assert_allclose(absolute, [1.5 + math.log(40)] * 2)


def test_phi_is_the_sub_gaussian_constant_of_a_bernoulli_variable():
    assert phi(0.5) == 0.5
    assert phi(0.3) == pytest.approx(phi(0.7))
    assert phi(0.5 + 1e-6) == pytest.approx(0.5, abs=1e-6)
    # E exp(t (B - p)) <= exp(t^2 phi / 4), with equality somewhere: Kearns and Saul.
    for p in (0.1, 0.4, 0.9):
        t = np.linspace(-20, 20, 4001)
        exponent = np.log((1 - p) * np.exp(-t * p) + p * np.exp(t * (1 - p)))
        slack = t**2 * phi(p) / 4 - exponent
        assert slack.min() >= -1e-12
        touching = 2 * math.log((1 - p) / p)
        assert np.interp(touching, t, slack) == pytest.approx(0, abs=1e-4)


def test_the_sweep_ends_when_most_rows_have_passed():
    c = torch.cat([0.3 + 0.05 * random(8, 20), -torch.full((2, 20), 1e-3)])
    whole, early = layer_q(c, 0.9, stop=1.1), layer_q(c, 0.9, stop=0.8)
    # The last two rows fall to the end of the range; nobody waits for them.
    assert whole.rows[-1] == pytest.approx(0.999, abs=1e-3)
    assert early.rows[-1] < 0.6
    np.testing.assert_array_equal(early.rows[:8], whole.rows[:8])
    assert early.passed == 0.8


def test_rows_without_a_change_do_not_count():
    c = 0.5 * random(6, 20) + 0.4
    assert layer_q(torch.cat([c, torch.zeros(30, 20)]), 0.9).q == layer_q(c, 0.9).q
    assert layer_q(torch.zeros(3, 4), 0.9).q == pytest.approx(0.1)


@pytest.mark.parametrize(("arguments", "word"), [((1.0, 0.45), "drop"), ((0.9, 0.0), "eta"), ((0.9, math.inf), "eta")])
def test_values_out_of_range_are_refused(arguments, word):
    with pytest.raises(UsageError, match=word):
        layer_q(torch.ones(1, 1), *arguments)
    with pytest.raises(UsageError, match="signed, absolute"):
        layer_q(torch.ones(1, 1), 0.9, rows="both")
