from __future__ import annotations

import itertools
import math

import pytest
import torch

from autopeft.methods._ring import factorise, ring_matrix, ring_outer
from autopeft.methods._transform import project_on_transforms


@pytest.mark.parametrize(
    ("n", "parts", "factors"),
    [
        (768, 3, (8, 8, 12)),
        (640, 3, (8, 8, 10)),
        (1280, 3, (8, 10, 16)),
        (2048, 3, (8, 16, 16)),
        (3072, 3, (12, 16, 16)),
        (147, 3, (3, 7, 7)),
        (13, 3, (1, 1, 13)),
        (1, 2, (1, 1)),
        (12, 1, (12,)),
        (16, 4, (2, 2, 2, 2)),
    ],
)
def test_factors(n: int, parts: int, factors: tuple[int, ...]) -> None:
    assert factorise(n, parts) == factors


@pytest.mark.parametrize("n", [1, 2, 30, 36, 97, 144, 360])
def test_factors_are_the_most_even_of_all(n: int) -> None:
    divisors = [d for d in range(1, n + 1) if n % d == 0]
    every = [t for t in itertools.product(divisors, repeat=3) if math.prod(t) == n]
    assert sum(f * f for f in factorise(n, 3)) == min(sum(f * f for f in t) for t in every)


@pytest.mark.parametrize("modes", [1, 2, 3])
def test_ring_matrix_entry_by_entry(modes: int) -> None:
    shapes = [(2, 3), (3, 2), (2, 2)][:modes]
    cores = [torch.randn(m, n, 2, 2, dtype=torch.float64) for m, n in shapes]
    found = ring_matrix(cores)
    rows = list(itertools.product(*(range(m) for m, _ in shapes)))
    columns = list(itertools.product(*(range(n) for _, n in shapes)))
    assert found.shape == (len(rows), len(columns))
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            product = torch.eye(2, dtype=torch.float64)
            for core, a, b in zip(cores, row, column, strict=True):
                product = product @ core[a, b]
            assert float(found[i, j]) == pytest.approx(float(product.trace()))


def test_rank_1_is_the_kronecker_product() -> None:
    a, b, c = (torch.randn(n, n, dtype=torch.float64) for n in (2, 3, 4))
    found = ring_matrix([m[:, :, None, None] for m in (a, b, c)])
    torch.testing.assert_close(found, torch.kron(torch.kron(a, b), c))


def test_ring_entry_by_entry() -> None:
    rows = [torch.randn(n, 2, 2, dtype=torch.float64) for n in (2, 3)]
    columns = [torch.randn(n, 2, 2, dtype=torch.float64) for n in (3, 2)]
    down, up = ring_outer(rows, columns)
    assert (down.shape, up.shape) == ((4, 6), (6, 4))
    for (i, (a, b)), (j, (c, d)) in itertools.product(
        enumerate(itertools.product(range(2), range(3))), enumerate(itertools.product(range(3), range(2)))
    ):
        oracle = (rows[0][a] @ rows[1][b] @ columns[0][c] @ columns[1][d]).trace()
        assert float((up @ down)[i, j]) == pytest.approx(float(oracle))


@pytest.mark.parametrize("factors", [(12,), (3, 4), (2, 2, 3), (1, 3, 4)])
def test_projection_on_transforms(factors: tuple[int, ...]) -> None:
    weight, signal = (torch.randn(7, 3, 2, 2, dtype=torch.float64) for _ in range(2))
    held, rest = project_on_transforms(weight, signal, factors)
    steps = []
    for mode, n in enumerate(factors):
        for a, b in itertools.product(range(n), repeat=2):
            parts = [torch.eye(m, dtype=torch.float64) for m in factors]
            parts[mode] = torch.zeros(n, n, dtype=torch.float64)
            parts[mode][a, b] = 1.0
            whole = parts[0]
            for part in parts[1:]:
                whole = torch.kron(whole, part)
            steps.append((weight.flatten(1) @ whole).flatten())
    u, values, _ = torch.linalg.svd(torch.stack(steps, 1), full_matrices=False)
    basis = u[:, values > 1e-9 * values[0]]
    target = signal.flatten()
    assert held == pytest.approx(float((basis.T @ target).square().sum()))
    torch.testing.assert_close(rest.flatten(), target - basis @ (basis.T @ target))


def test_projection_on_transforms_of_nothing() -> None:
    held, rest = project_on_transforms(torch.zeros(3, 4), torch.ones(3, 4), (2, 2))
    assert held == 0.0
    assert torch.equal(rest, torch.ones(3, 4, dtype=torch.float64))
