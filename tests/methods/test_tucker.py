from __future__ import annotations

import pytest
import torch

from autopeft.methods._tucker import mode_product, nested_energies, tucker

SHAPES = [(6, 5), (6, 5, 3), (6, 5, 3, 2), (4, 5, 3, 2, 3)]  # Linear, 1-D, 2-D and 3-D convolution
RANKS = [(2, 3), (2, 3, 1), (2, 3, 2, 1), (2, 3, 2, 2, 1)]
CASES = list(zip(SHAPES, RANKS, strict=True))


@pytest.mark.parametrize(("shape", "ranks"), CASES)
def test_tucker_is_the_sum_over_all_ranks(shape: tuple[int, ...], ranks: tuple[int, ...]) -> None:
    core = torch.randn(ranks, dtype=torch.float64)
    factors = [torch.randn(n, r, dtype=torch.float64) for n, r in zip(shape, ranks, strict=True)]
    small, big = "abcde"[: len(shape)], "vwxyz"[: len(shape)]
    pattern = ",".join([small, *(f"{b}{s}" for b, s in zip(big, small, strict=True))]) + f"->{big}"
    torch.testing.assert_close(tucker(core, factors), torch.einsum(pattern, core, *factors))
    half = tucker(core, factors[1:], first=1)
    assert half.shape == (ranks[0], *shape[1:])
    torch.testing.assert_close(mode_product(half, factors[0], 0), tucker(core, factors))


@pytest.mark.parametrize(("shape", "ranks"), CASES)
def test_energy_is_that_of_the_projected_tensor(shape: tuple[int, ...], ranks: tuple[int, ...]) -> None:
    tensor = torch.randn(shape, dtype=torch.float64)
    projected = tensor
    for mode, r in enumerate(ranks):
        u = torch.linalg.svd(tensor.movedim(mode, 0).flatten(1)).U[:, :r]
        projected = mode_product(projected, u @ u.T, mode)
    if len(shape) == 2:  # ranks (2, 3): the smaller one decides
        assert nested_energies(tensor, [ranks])[0] >= float(projected.square().sum()) - 1e-9
    else:
        assert nested_energies(tensor, [ranks]) == pytest.approx((float(projected.square().sum()),))
    assert nested_energies(tensor, [shape]) == pytest.approx((float(tensor.square().sum()),))


def test_energy_of_a_matrix_is_that_of_its_singular_values() -> None:
    matrix = torch.diag(torch.tensor([3.0, 2.0, 1.0]))[:, :2]
    assert nested_energies(matrix, [(1, 1), (1, 2), (3, 2)]) == pytest.approx((9, 9, 13))


def test_energy_of_a_tensor_of_those_ranks_is_all() -> None:
    factors = [torch.randn(n, r) for n, r in zip((9, 8, 3, 3), (2, 1, 2, 1), strict=True)]
    tensor = tucker(torch.randn(2, 1, 2, 1), factors)
    (held,) = nested_energies(tensor, [(2, 1, 2, 1)])
    assert held == pytest.approx(float(tensor.double().square().sum()), rel=1e-5)


def test_a_mode_longer_than_all_others_together() -> None:
    tensor = torch.randn(30, 2, 2, dtype=torch.float64)
    assert nested_energies(tensor, [(4, 2, 2), (30, 2, 2)]) == pytest.approx((float(tensor.square().sum()),) * 2)
