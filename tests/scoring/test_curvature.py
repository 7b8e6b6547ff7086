from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from autopeft.scoring._curvature import CurvatureSums
from autopeft.scoring._shrinkage import Noisy, shrink


def summed(gradients: Tensor, left: bool = False, right: bool = False, weights: list[float] | None = None):  # type: ignore[no-untyped-def]
    sums = CurvatureSums(gradients.shape[1:], gradients[0], True, left, right)
    for i, gradient in enumerate(gradients):
        sums.add(gradient, 4.0 if weights is None else weights[i], int(2 * i >= len(gradients)))
    return sums


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_agreement_is_the_mean_product_of_two_batches() -> None:
    gradients = normal(7, 3, 4) + 0.3
    pairs = [float((a * b).sum()) for a, b in itertools.combinations(gradients, 2)]
    found = summed(gradients).agreement()
    assert found.energy == pytest.approx(sum(pairs) / len(pairs))
    total, each = gradients.sum(0).square().sum(), gradients.square().sum()
    assert found.energy == pytest.approx(float(total - each) / 42)


def test_a_last_batch_of_fewer_samples_counts_for_the_moments_alone() -> None:
    gradients = normal(5, 3)
    whole, ragged = summed(gradients[:4]), summed(gradients, weights=[4, 4, 4, 4, 1])
    assert ragged.agreement().energy == pytest.approx(whole.agreement().energy)
    expected = (4 * gradients[:4].sum(0) + gradients[4]) / 17
    torch.testing.assert_close(ragged.known((8, 9)).signal, expected)
    assert math.isinf(summed(gradients[:1]).agreement().variance)


def test_the_variance_is_right_where_gradients_are_noise() -> None:
    """600 passes of 12 batches of noise with a covariance far from round: U has mean 0 and the stated variance."""
    mix = torch.diag(torch.tensor([3.0, 1.0, 1.0, 0.3, 0.1], dtype=torch.float64)) @ normal(5, 5, seed=3)
    found = [summed(normal(12, 5, seed=s) @ mix).agreement() for s in range(600)]
    energies = torch.tensor([f.energy for f in found], dtype=torch.float64)
    stated = sum(f.variance for f in found) / len(found)
    assert abs(float(energies.mean())) < 4 * float(energies.std()) / 600**0.5
    assert stated == pytest.approx(float(energies.var()), rel=0.2)


def test_factors_of_a_kronecker_covariance() -> None:
    """Gradients `B z A^T` with z of unit covariance have F = B B^T (x) A A^T exactly when z runs over all signs."""
    a, b = torch.diag(torch.tensor([2.0, 0.5], dtype=torch.float64)), normal(2, 2, seed=1)
    z = torch.tensor(list(itertools.product((1.0, -1.0), repeat=4)), dtype=torch.float64).view(-1, 2, 2)
    gradients = b @ z @ a
    sums = summed(gradients, left=True, right=True)
    diagonal = gradients.square().mean(0)
    frame = sums.frame(diagonal)
    covariance = torch.einsum("nij,nkl->ijkl", gradients, gradients) / len(gradients)
    probe = normal(2, 2, seed=2)
    # In the frame F is diagonal: the quadratic form is a weighted sum of squares.
    form = torch.einsum("ij,ijkl,kl->", probe, covariance, probe)
    torch.testing.assert_close((frame.curvature * frame.rotate(probe).square()).sum(), form)
    torch.testing.assert_close(frame.restore(frame.rotate(probe)), probe)
    assert float(frame.curvature.sum()) == pytest.approx(float(diagonal.sum()))


def test_a_side_without_a_factor_keeps_its_coordinates() -> None:
    gradients = normal(6, 3, 4)
    frame = summed(gradients, right=True).frame(gradients.square().mean(0))
    assert frame.left is None
    rows = gradients.square().mean(0).sum(1)
    torch.testing.assert_close(frame.curvature.sum(1), rows)


def test_shrinkage_believes_what_is_measured_well() -> None:
    """Shares that scatter far beyond their noise are kept; shares that are all noise become the common one."""
    exact = [Noisy(share * 10, 1e-12, 10.0) for share in (0.1, 0.5, 0.9)]
    weights, tau = shrink(exact, 1e-6)
    assert weights == pytest.approx([1, 1, 1])
    assert tau == pytest.approx(0.5)
    noisy = [Noisy(share * 10, 1e4, 10.0) for share in (0.1, 0.5, 0.9)]
    weights, tau = shrink(noisy, 1e-6)
    assert weights == [0, 0, 0]
    assert tau == pytest.approx(0.5)
    # Gradients that disagree by construction leave the floor, and one tensor tells nothing of its family.
    assert shrink([Noisy(-1.0, 1.0, 10.0)] * 4, 0.01) == ([0.0] * 4, 0.01)
    assert shrink([Noisy(5.0, 1.0, 10.0)], 0.02) == ([0.0], 0.02)


def test_shrinkage_recovers_the_scatter() -> None:
    """Shares from N(0.3, 0.1^2) seen with noise of deviation 0.2: w = 0.01 / (0.01 + 0.04) = 0.2."""
    true = 0.3 + 0.1 * normal(4000)
    seen = true + 0.2 * normal(4000, seed=1)
    weights, tau = shrink([Noisy(float(s), 0.04, 1.0) for s in seen], 0.0)
    assert weights[0] == pytest.approx(0.2, abs=0.03)
    assert tau == pytest.approx(0.3, abs=0.02)
    best = [w * float(s) + (1 - w) * tau for w, s in zip(weights, seen, strict=True)]
    error = torch.tensor(best) - true
    assert float(error.square().mean()) < 0.25 * float((seen - true).square().mean())
