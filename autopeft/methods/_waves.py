"""Two-dimensional cosine waves on a matrix: their frequencies, energies, and orders that make a matrix smooth."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["count_waves", "distinct_waves", "nearest_tour", "wave_energies", "waves"]


def count_waves(rows: int, columns: int) -> int:
    """How many different waves there are: frequencies (u, v) and (-u, -v) are one wave."""
    alone = (2 - rows % 2) * (2 - columns % 2)
    return (rows * columns + alone) // 2


def distinct_waves(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """One frequency of every wave.

    Returns:
        Flat frequencies `u * columns + v`, increasing, int64; and whether the mirror image (-u, -v) is another one.
    """
    u, v = torch.arange(rows)[:, None], torch.arange(columns)[None]
    here = u * columns + v
    mirror = (-u % rows) * columns + (-v % columns)
    first = (here <= mirror).flatten()
    return here.flatten()[first], (here != mirror).flatten()[first]


def waves(values: Tensor, flat: Tensor, rows: int, columns: int) -> Tensor:
    """Real part of the inverse discrete Fourier transform of a sparse real spectrum, (rows, columns).

    It is `1 / (rows * columns) * sum of c cos(2 pi (u i / rows + v j / columns))`.

    Args:
        values: c (n,), with gradient.
        flat: flat frequencies (n,), int64.
        rows: rows of the matrix.
        columns: columns of the matrix.
    """
    spectrum = values.new_zeros(rows * columns).index_put((flat,), values)
    real: Tensor = torch.fft.ifft2(spectrum.view(rows, columns)).real
    return real


def wave_energies(spectrum: Tensor, flat: Tensor, paired: Tensor) -> Tensor:
    """Energy of a matrix along each wave, given its discrete Fourier transform.

    The inner product with the wave is the real part of the transform; the wave's squared norm is half the number of
    entries, or all of it where the frequency is its own mirror image. Different waves are orthogonal.

    Args:
        spectrum: complex (rows, columns).
        flat: flat frequencies (n,).
        paired: whether each has another mirror image.
    """
    inner = spectrum.real.flatten()[flat]
    return inner.square() * torch.where(paired, 2.0, 1.0) / spectrum.numel()


def nearest_tour(matrix: Tensor, start: int) -> Tensor:
    """Order of the rows: from `start`, always on to the nearest row not visited yet, the first among equals.

    Args:
        matrix: (n, m) float64 on the CPU; the distance is Euclidean.
        start: the first row.

    Returns:
        A permutation (n,), int64.
    """
    squares = matrix.square().sum(1)
    # Half the squared distance from row i, less what is the same for all: |b|^2 / 2 - a . b
    inner = matrix @ matrix.T
    half = squares / 2
    order = torch.empty(len(matrix), dtype=torch.int64)
    here = start
    for step in range(len(matrix)):
        order[step] = here
        half[here] = torch.inf
        here = int((half - inner[here]).argmin())
    return order
