from __future__ import annotations

import pytest
import scipy.linalg
import torch

from autopeft.methods._fastfood import Fastfood, Projection, hadamard
from autopeft.methods._projections import DenseProjection, SparseProjection


@pytest.mark.parametrize("n", [1, 2, 8, 64])
def test_hadamard_is_the_product_with_the_matrix(n: int) -> None:
    x = torch.randn(3, 2, n, dtype=torch.float64)
    before = x.clone()
    matrix = torch.from_numpy(scipy.linalg.hadamard(n)).double()
    torch.testing.assert_close(hadamard(x), x @ matrix)
    torch.testing.assert_close(hadamard(hadamard(x)), n * x)
    assert torch.equal(x, before)
    # A view that is not contiguous.
    torch.testing.assert_close(hadamard(x.transpose(0, 1)), x.transpose(0, 1) @ matrix)


def test_hadamard_takes_powers_of_two() -> None:
    with pytest.raises(ValueError, match="power of 2, got 6"):
        hadamard(torch.zeros(6))


def drawn(kind: type[Projection], total: int, size: int, seed: int = 3) -> Projection:
    projection = kind(total, size)
    projection.draw(seed, torch.device("cpu"))
    return projection


def matrix_of(projection: Projection) -> torch.Tensor:
    columns = torch.eye(projection.size, dtype=torch.float64)
    return torch.stack([projection.rows(z, 0, projection.total) for z in columns], dim=1)


@pytest.mark.parametrize(("total", "size"), [(32, 8), (29, 5), (7, 1), (5, 16), (70, 9)])
def test_fastfood_is_the_product_of_its_matrices(total: int, size: int) -> None:
    """H G Pi H B of every block, written out, cut to `total` rows, with one factor."""
    fast = drawn(Fastfood, total, size)
    assert isinstance(fast, Fastfood)
    n = fast.width
    assert size <= n < 2 * size
    h = torch.from_numpy(scipy.linalg.hadamard(n)).double()
    blocks = []
    for signs, order, gauss in zip(fast.signs, fast.order, fast.gauss, strict=True):
        assert sorted(order.tolist()) == list(range(n))
        permutation = torch.eye(n, dtype=torch.float64)[order.long()]
        blocks.append(h @ torch.diag(gauss.double()) @ permutation @ h @ torch.diag(signs.double()))
    oracle = torch.cat(blocks)[:total, :size]
    used = torch.full((len(blocks),), float(n), dtype=torch.float64)
    used[-1] = total - (len(blocks) - 1) * n
    oracle /= (used * fast.gauss.double().square().sum(1)).sum().sqrt()
    torch.testing.assert_close(matrix_of(fast), oracle)


def test_fastfood_columns_have_unit_norm() -> None:
    whole = matrix_of(drawn(Fastfood, 64, 16))
    torch.testing.assert_close(whole.square().sum(0), torch.ones(16, dtype=torch.float64))
    cut = torch.stack([matrix_of(drawn(Fastfood, 23, 16, seed)).square().sum(0) for seed in range(120)])
    assert cut.std() > 0.05
    assert float(cut.mean()) == pytest.approx(1.0, abs=0.03)


def test_other_columns_have_unit_norm() -> None:
    dense = matrix_of(drawn(DenseProjection, 50, 6))
    torch.testing.assert_close(dense.square().sum(0), torch.ones(6, dtype=torch.float64), atol=1e-6, rtol=0)
    sparse = torch.stack([matrix_of(drawn(SparseProjection, 100, 6, seed)) for seed in range(200)])
    assert float(sparse.square().sum(1).mean()) == pytest.approx(1.0, abs=0.03)
    assert int((sparse != 0).sum(1).max()) <= 10
    values = sparse[sparse != 0].abs() * 10**0.5
    torch.testing.assert_close(values, values.round())
    assert abs(float(sparse.sign().sum() / (sparse != 0).sum())) < 0.05


@pytest.mark.parametrize("kind", [Fastfood, DenseProjection, SparseProjection])
def test_rows_are_rows_of_one_matrix(kind: type[Projection]) -> None:
    projection = drawn(kind, 45, 6)
    z = torch.randn(6, dtype=torch.float64)
    whole = matrix_of(projection) @ z
    for start, stop in ((0, 45), (0, 1), (7, 8), (8, 16), (5, 29), (44, 45)):
        torch.testing.assert_close(projection.rows(z, start, stop), whole[start:stop])


@pytest.mark.parametrize("kind", [Fastfood, DenseProjection, SparseProjection])
def test_gradients_of_both_orders(kind: type[Projection]) -> None:
    projection = drawn(kind, 45, 6)
    z = torch.randn(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: projection.rows(v, 5, 29), (z,))
    assert torch.autograd.gradgradcheck(lambda v: projection.rows(v, 5, 29), (z,))


@pytest.mark.parametrize("kind", [Fastfood, DenseProjection, SparseProjection])
def test_the_seed_decides_everything_and_nothing_is_saved(kind: type[Projection]) -> None:
    one, same, other = drawn(kind, 45, 6), drawn(kind, 45, 6), drawn(kind, 45, 6, seed=4)
    torch.manual_seed(5)
    assert torch.equal(matrix_of(one), matrix_of(same))
    assert not torch.equal(matrix_of(one), matrix_of(other))
    assert not one.state_dict()
    assert sum(1 for _ in one.buffers()) > 0


def test_single_precision_is_drawn_alike() -> None:
    fast = drawn(Fastfood, 45, 6)
    z = torch.randn(6)
    torch.testing.assert_close(fast.rows(z, 0, 45).double(), fast.rows(z.double(), 0, 45), atol=1e-5, rtol=1e-5)
