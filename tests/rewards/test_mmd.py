from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from autopeft.errors import UsageError
from autopeft.rewards._mmd import gaussian_mmd, polynomial_mmd


def draw(n: int, d: int, seed: int, shift: float = 0.0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def by_hand(x: Tensor, y: Tensor) -> float:
    """The U-statistic by its definition, pair by pair."""

    def k(a: Tensor, b: Tensor) -> float:
        return float((a @ b) / len(a) + 1) ** 3

    within = [sum(k(a, b) for a, b in itertools.permutations(s, 2)) / (len(s) * (len(s) - 1)) for s in (x, y)]
    return sum(within) - 2 * sum(k(a, b) for a in x for b in y) / (len(x) * len(y))


def test_equals_its_definition() -> None:
    x, y = draw(6, 4, 0), draw(5, 4, 1, 0.5)
    assert polynomial_mmd(x, y).value == pytest.approx(by_hand(x, y))


def test_hand_worked() -> None:
    # In one dimension k(a, b) = (a b + 1)^3. x = (0, 0, 1): pairs 1, 1, 1; y = (0, 0, 0): 1; across 1. Then 1 + 1 - 2.
    x, y = torch.tensor([[0.0], [0.0], [1.0]]), torch.zeros(3, 1)
    assert polynomial_mmd(x, y).value == pytest.approx(0.0)
    # x = (1, 1, 1): 8 within, 1 across: 8 + 1 - 2 = 7, and every sample is like the others.
    found = polynomial_mmd(torch.ones(3, 1), y)
    assert (found.value, found.error) == (pytest.approx(7.0), pytest.approx(0.0))


def test_error_is_the_jackknifes() -> None:
    x, y = draw(7, 3, 2), draw(9, 3, 3, 0.4)
    variance = 0.0
    for left_out, n in (("x", len(x)), ("y", len(y))):
        values = []
        for i in range(n):
            keep = [j for j in range(n) if j != i]
            values.append(by_hand(x[keep], y) if left_out == "x" else by_hand(x, y[keep]))
        mean = sum(values) / n
        variance += (n - 1) / n * sum((v - mean) ** 2 for v in values)
    assert polynomial_mmd(x, y).error == pytest.approx(math.sqrt(variance))


def test_no_bias_and_an_honest_error() -> None:
    found = [polynomial_mmd(draw(40, 5, 2 * s), draw(30, 5, 2 * s + 1)) for s in range(300)]
    values = torch.tensor([f.value for f in found])
    spread = float(values.std())
    assert abs(float(values.mean())) < 3 * spread / math.sqrt(300)
    # Between equal distributions the jackknife is on the safe side, between different ones it is right.
    assert 1.0 < float(torch.tensor([f.error for f in found]).mean()) / spread < 1.6
    found = [polynomial_mmd(draw(40, 5, 2 * s), draw(30, 5, 2 * s + 1, 1.0)) for s in range(200)]
    spread = float(torch.tensor([f.value for f in found]).std())
    assert float(torch.tensor([f.error for f in found]).mean()) == pytest.approx(spread, rel=0.2)


def test_gaussian_hand_worked() -> None:
    # Three times one point against three times another at distance 2 sigma: 1 + 1 - 2 exp(-2).
    x, y = torch.zeros(3, 2), torch.tensor([[4.0, 0.0]] * 3)
    expected = 2 - 2 * math.exp(-2)
    for unbiased in (False, True):
        assert gaussian_mmd(x, y, 2.0, normalise=False, unbiased=unbiased).value == pytest.approx(expected)
    # Unit length: opposite directions are at distance 2.
    assert gaussian_mmd(torch.full((3, 1), 5.0), torch.full((3, 1), -0.1), 1.0).value == pytest.approx(expected)


def test_gaussian_bias_is_what_the_diagonal_adds() -> None:
    x, y = draw(12, 4, 4), draw(10, 4, 5)
    biased, unbiased = (gaussian_mmd(x, y, 1.5, normalise=False, unbiased=u).value for u in (False, True))

    def mean(s: Tensor) -> float:
        k = torch.exp(-torch.cdist(s, s).square() / 4.5)
        return float((k.sum() - len(s)) / (len(s) * (len(s) - 1)))

    assert biased - unbiased == pytest.approx((1 - mean(x)) / 12 + (1 - mean(y)) / 10)
    assert gaussian_mmd(x, x, 1.0).value == pytest.approx(0, abs=1e-12)


def test_bad_inputs_are_refused() -> None:
    x = draw(4, 3, 0)
    with pytest.raises(UsageError, match="at least 3 rows"):
        polynomial_mmd(x[:2], x)
    with pytest.raises(UsageError, match="3 and 2"):
        polynomial_mmd(x, x[:, :2])
    with pytest.raises(UsageError, match="above 0"):
        gaussian_mmd(x, x, 0.0)
