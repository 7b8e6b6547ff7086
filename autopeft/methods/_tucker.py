"""Tucker form of a tensor with any number of modes: a small core, and one factor matrix per mode."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from autopeft.methods._spectrum import squared_singular_values

__all__ = ["mode_product", "nested_energies", "tucker"]


def mode_product(tensor: Tensor, matrix: Tensor, mode: int) -> Tensor:
    """`tensor x_mode matrix`: mode `mode`, of length r, becomes one of length n under a matrix (n, r)."""
    product: Tensor = torch.tensordot(matrix, tensor, ([1], [mode]))
    return product.movedim(0, mode)


def tucker(core: Tensor, factors: Sequence[Tensor], first: int = 0) -> Tensor:
    """`core x_first factors[0] x_(first+1) factors[1] ...`, all other modes left as they are.

    Args:
        core: (r_1, ..., r_N).
        factors: matrices (n_i, r_i) for consecutive modes.
        first: the mode of the first factor.
    """
    for mode, factor in enumerate(factors, first):
        core = mode_product(core, factor, mode)
    return core


def nested_energies(tensor: Tensor, ranks: Sequence[Sequence[int]]) -> tuple[float, ...]:
    """Energy of a tensor that a Tucker form of each ranks captures, its factors the leading singular vectors by mode.

    This is the truncated higher-order singular value decomposition. Its factors are nested, so larger ranks never
    capture less. For a matrix it is the best there is, the sum of the largest squared singular values; with more modes
    the best may capture more, but misses at least 1 / N of what this one misses.

    Args:
        tensor: N >= 2 modes.
        ranks: per question one rank per mode, each from 1 to the mode's length.
    """
    exact = tensor.detach().to(device="cpu", dtype=torch.float64)
    if exact.ndim == 2:
        total = squared_singular_values(exact).cumsum(0)
        return tuple(float(total[min(rank) - 1]) for rank in ranks)
    core = exact
    for mode in range(exact.ndim):
        core = mode_product(core, _leading(exact, mode).T, mode)
    held = core.square()
    for mode in range(exact.ndim):
        held = held.cumsum(mode)
    return tuple(float(held[tuple(min(r, n) - 1 for r, n in zip(rank, held.shape, strict=True))]) for rank in ranks)


def _leading(tensor: Tensor, mode: int) -> Tensor:
    """Left singular vectors of a mode's unfolding, by decreasing singular value, (n, min(n, other entries))."""
    unfolded = tensor.movedim(mode, 0).flatten(1)
    if unfolded.shape[0] <= unfolded.shape[1]:
        vectors: Tensor = torch.linalg.eigh(unfolded @ unfolded.T).eigenvectors
        return vectors.flip(1)
    u: Tensor = torch.linalg.svd(unfolded, full_matrices=False).U
    return u
