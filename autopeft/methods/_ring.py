"""Tensor rings: long vectors and large matrices made of small cores whose product is traced."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["factorise", "ring_matrix", "ring_outer"]


@functools.cache
def factorise(n: int, parts: int) -> tuple[int, ...]:
    """`parts` factors of n, increasing, with the smallest sum of squares: 768 is 8 * 8 * 12; a prime is 1 * 1 * n."""
    if parts == 1:
        return (n,)
    candidates = (
        (first, *rest)
        for first in range(1, round(n ** (1 / parts)) + 2)
        if n % first == 0
        for rest in [factorise(n // first, parts - 1)]
        if first <= rest[0]
    )
    return min(candidates, key=lambda factors: (sum(f * f for f in factors), factors))


def ring_matrix(cores: Sequence[Tensor]) -> Tensor:
    """`T[(i_1..i_N), (j_1..j_N)] = trace(A_1[i_1, j_1] ... A_N[i_N, j_N])`.

    Args:
        cores: (m_i, n_i, R, R) each; at rank R = 1 the result is their Kronecker product.

    Returns:
        (product of m_i, product of n_i).
    """
    left, *rest = cores
    if not rest:
        return torch.einsum("mnaa->mn", left)
    for core in rest[:-1]:
        m, n, p, q, r = *left.shape[:2], *core.shape[:3]
        left = torch.einsum("mnab,pqbc->mpnqac", left, core).reshape(m * p, n * q, r, r)
    # The last product is traced at once: it is never held with its R x R matrices.
    m, n, p, q = *left.shape[:2], *rest[-1].shape[:2]
    return torch.einsum("mnab,pqba->mpnq", left, rest[-1]).reshape(m * p, n * q)


def ring_outer(rows: Sequence[Tensor], columns: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Factors of the matrix `D[(i_1..), (j_1..)] = trace(B_1[i_1] B_2[i_2] ... C_1[j_1] C_2[j_2] ...)`.

    Args:
        rows: cores (k_i, R, R) over the modes of the rows.
        columns: cores (d_i, R, R) over the modes of the columns.

    Returns:
        `(down, up)`: (R^2, product of d_i) and (product of k_i, R^2) with `D = up @ down`.
    """
    up, down = (functools.reduce(_chain, cores) for cores in (rows, columns))
    return down.transpose(1, 2).flatten(1).T, up.flatten(1)


def _chain(left: Tensor, right: Tensor) -> Tensor:
    """Every product of a matrix of (m, R, R) with one of (n, R, R), (m n, R, R)."""
    return torch.einsum("mab,nbc->mnac", left, right).flatten(0, 1)
