from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from autopeft.errors import UsageError
from autopeft.rewards._frechet import extrapolate, fid, frechet, line, samples_for


def draw(n: int, d: int, seed: int, shift: float = 0.0) -> Tensor:
    """Correlated features of several scales."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=generator, dtype=torch.float64)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) @ mix + shift


def by_scipy(x: Tensor, y: Tensor) -> float:
    """FID as published: numpy's covariances and scipy's general matrix square root."""
    a, b = x.numpy(), y.numpy()
    s, t = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(s @ t).real
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s) + np.trace(t) - 2 * np.trace(root))


@pytest.mark.parametrize(("n", "m", "d"), [(400, 300, 20), (60, 500, 20), (64, 64, 8), (12, 15, 20), (500, 10, 30)])
def test_equals_scipys_square_root(n: int, m: int, d: int) -> None:
    x, y = draw(n, d, 1), draw(m, d, 2, 0.3)
    assert fid(x, y) == pytest.approx(by_scipy(x, y), rel=1e-6)
    assert fid(x, y) == pytest.approx(fid(y, x), rel=1e-9)


def test_means_and_covariances_give_the_same() -> None:
    x, y = draw(200, 6, 3), draw(150, 6, 4, 1.0)
    assert frechet(x.mean(0), torch.cov(x.T), y.mean(0), torch.cov(y.T)) == pytest.approx(fid(x, y), rel=1e-9)


def test_closed_forms() -> None:
    # In one dimension (m - m')^2 + (s - s')^2.
    one = torch.ones(1, 1)
    assert frechet(3 * one[0], 4 * one, one[0], 9 * one) == pytest.approx((3 - 1) ** 2 + (2 - 3) ** 2)
    # Covariances that commute: the sum over the eigenvalues.
    zero = torch.zeros(2)
    assert frechet(zero, torch.diag(torch.tensor([1.0, 16.0])), zero, torch.eye(2)) == pytest.approx(9.0)
    # (-1, 1) and (-3, 3): standard deviations of root 2 and 3 root 2.
    x, y = torch.tensor([[-1.0], [1.0]]), torch.tensor([[-3.0], [3.0]])
    assert fid(x, y) == pytest.approx(8.0)


def test_nothing_separates_a_set_from_itself_and_a_shift_counts_in_full() -> None:
    for n in (5, 200):
        x = draw(n, 10, 5)
        assert fid(x, x) == pytest.approx(0, abs=1e-9)
        assert fid(x, x + 2) == pytest.approx(40.0, rel=1e-9)


def test_the_bias_falls_as_one_over_n() -> None:
    # In one dimension, N samples of N(0, 1) against mean 0 and variance 1: the variance of the mean is 1 / N, that of
    # the deviation 1 / (2 N), so that N times the expected FID is 1.5.
    generator = torch.Generator().manual_seed(0)
    truth = torch.tensor([[-0.5], [0.5]], dtype=torch.float64).mul(2**0.5)
    for n in (50, 200):
        found = [fid(torch.randn(n, 1, generator=generator, dtype=torch.float64), truth) for _ in range(400)]
        assert n * sum(found) / len(found) == pytest.approx(1.5, rel=0.2)


def test_a_line_is_found_exactly() -> None:
    at = torch.tensor([1 / 50, 1 / 75, 1 / 100, 1 / 150])
    found = line(at, 2.0 + 30.0 * at.double())
    assert (found.value, found.slope) == (pytest.approx(2.0), pytest.approx(30.0))
    assert found.error == pytest.approx(0, abs=1e-9)
    # Three points about the line y = 0 with residuals (1, -2, 1) / 6 of the fit: worked by hand.
    scattered = line(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64))
    assert (scattered.value, scattered.slope) == (pytest.approx(-2 / 3), pytest.approx(0.5))
    assert scattered.error == pytest.approx(math.sqrt((1 / 6) * (1 / 3 + 4 / 2)))


def test_extrapolation_takes_the_bias_away() -> None:
    # Equal distributions: the truth is 0. In 16 dimensions 128 samples are off by more than the extrapolation is.
    plain, ideal = [], []
    truth = draw(5_000, 16, 7)
    for seed in range(8):
        generator = torch.Generator().manual_seed(100 + seed)
        x = truth[torch.randperm(len(truth), generator=generator)[:512]]
        plain.append(fid(x, truth))
        ideal.append(extrapolate(x, truth, (128, 192, 256, 384, 512), seed).value)
    assert min(plain) > 0
    assert abs(sum(ideal)) < 0.35 * sum(plain)
    again = extrapolate(x, truth, (128, 256, 512), 3)
    assert again == extrapolate(x, truth, (128, 256, 512), 3)


def test_samples_for_a_tolerance() -> None:
    assert samples_for(30.0, 0.1) == 300
    assert samples_for(-30.0, 0.11) == 273
    assert samples_for(0.0, 0.1) == 2
    with pytest.raises(UsageError, match="above 0"):
        samples_for(1.0, 0.0)


def test_bad_inputs_are_refused() -> None:
    x = draw(8, 3, 0)
    with pytest.raises(UsageError, match="at least 2 rows"):
        fid(x[:1], x)
    with pytest.raises(UsageError, match="3 and 2"):
        fid(x, x[:, :2])
    with pytest.raises(UsageError, match="NaN"):
        fid(x / 0, x)
    for sizes in ((4, 4), (1, 4), (4, 9)):
        with pytest.raises(UsageError, match="between 2 and 8"):
            extrapolate(x, x, sizes)
