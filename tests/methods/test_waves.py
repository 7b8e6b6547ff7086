from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from autopeft.methods._waves import count_waves, distinct_waves, nearest_tour, wave_energies, waves


def cosine(flat: int, rows: int, columns: int) -> Tensor:
    u, v = divmod(flat, columns)
    i, j = torch.arange(rows, dtype=torch.float64)[:, None], torch.arange(columns, dtype=torch.float64)[None]
    return torch.cos(2 * math.pi * (u * i / rows + v * j / columns))


@pytest.mark.parametrize(("rows", "columns"), [(4, 6), (5, 6), (5, 3), (1, 4), (1, 1)])
def test_waves_are_all_different_and_orthogonal(rows: int, columns: int) -> None:
    flat, paired = distinct_waves(rows, columns)
    assert len(flat) == count_waves(rows, columns)
    basis = torch.stack([cosine(int(f), rows, columns).flatten() for f in flat])
    gram = basis @ basis.T
    norms = torch.where(paired, rows * columns / 2, float(rows * columns)).double()
    torch.testing.assert_close(gram, torch.diag(norms), atol=1e-9, rtol=0)
    every = torch.stack([cosine(f, rows, columns).flatten() for f in range(rows * columns)])
    assert torch.linalg.matrix_rank(every) == len(flat)


def test_sparse_transform_is_a_sum_of_cosines() -> None:
    values, flat = torch.randn(5, dtype=torch.float64), torch.tensor([0, 3, 17, 22, 34])
    oracle = sum(c * cosine(int(f), 5, 7) for c, f in zip(values, flat, strict=True)) / 35
    torch.testing.assert_close(waves(values, flat, 5, 7), oracle)


def test_energy_is_the_projection_on_each_wave() -> None:
    matrix = torch.randn(4, 6, dtype=torch.float64)
    flat, paired = distinct_waves(4, 6)
    found = wave_energies(torch.fft.fft2(matrix), flat, paired)
    for f, value in zip(flat, found, strict=True):
        wave = cosine(int(f), 4, 6)
        assert float(value) == pytest.approx(float((matrix * wave).sum() ** 2 / wave.square().sum()), abs=1e-12)


def test_tour_goes_to_the_nearest_row() -> None:
    assert nearest_tour(torch.tensor([[0.0], [10.0], [1.0], [-3.0], [4.0]]).double(), 2).tolist() == [2, 0, 3, 4, 1]
    matrix = torch.randn(20, 3, dtype=torch.float64)
    order, left = [7], set(range(20)) - {7}
    while left:
        here = matrix[order[-1]]
        order.append(min(left, key=lambda j: float((matrix[j] - here).square().sum())))
        left.remove(order[-1])
    assert nearest_tour(matrix, 7).tolist() == order


def test_tour_of_equal_rows_takes_the_first() -> None:
    assert nearest_tour(torch.zeros(4, 2, dtype=torch.float64), 2).tolist() == [2, 0, 1, 3]


def test_tours_concentrate_the_spectrum_of_a_shuffled_smooth_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    i, j = torch.linspace(0, 1, 64).double()[:, None], torch.linspace(0, 1, 48).double()[None]
    smooth = torch.sin(3 * i + 2 * j) + torch.cos(5 * i * j) + (i - j) ** 2
    rows, columns = torch.randperm(64, generator=generator), torch.randperm(48, generator=generator)
    shuffled = smooth[rows][:, columns]
    shuffled = shuffled - shuffled.mean()
    first, second = nearest_tour(shuffled, 5), nearest_tour(shuffled.T, 7)
    ordered = shuffled[first][:, second]
    assert torch.equal(ordered[first.argsort()][:, second.argsort()], shuffled)

    def share(matrix: Tensor) -> float:
        energy = torch.fft.fft2(matrix).abs().square().flatten()
        return float(energy.topk(50).values.sum() / energy.sum())

    assert share(shuffled) < 0.6
    assert share(ordered) > 0.9
