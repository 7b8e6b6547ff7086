"""Row-permuted LDU factors of a weight that come out the same on every machine."""

from __future__ import annotations

import torch
from torch import Tensor

from autopeft.methods._bases import derived

__all__ = ["ldu"]

_LEVEL = 1e-9
"""Pivots are equal candidates within this relative distance of the largest; rounding is seven digits below it."""

_ZERO = 1e-9
"""A column or row whose entries are all below this times the weight's largest counts as zero."""


def ldu(tensor: Tensor, rows: tuple[int, int] | None, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first `rank` atoms of `W = (P L) diag(d) U`, W flattened to (out, in).

    Elimination by columns with partial pivoting in float64 on the CPU. The pivot is the first row of largest magnitude,
    where magnitudes that differ by less than 1e-9 count as equal: so the permutation is a function of the weight that
    does not hang on the last digit of a product, and need not be stored.

    Where a pivot is zero (its whole column is), d is 1 and U keeps the row as it is, with no unit diagonal; where the
    row is zero too, d is 0 and U has the unit diagonal alone. The product equals W in either case.

    Args:
        tensor: the whole weight, of any rank >= 2 and on any device.
        rows: the rows of a slice, None for all.
        rank: atoms wanted, at most min(out, in).

    Returns:
        `(PL, d, U)`: (out, rank), (rank,), (rank, in); float32 on the CPU, not to be written to. The rows of PL are in
        the weight's order: the permutation is in it.
    """
    # A few sizes instead of every one, so that the cache holds few versions: prefixes of a factorisation are its own.
    whole = min(len(tensor) if rows is None else rows[1] - rows[0], tensor[0].numel())
    wanted = next((n for n in (64, 256) if rank <= n < whole), whole)
    left, diagonal, right = derived(f"ldu{wanted}", tensor, rows, lambda weight: _factor(weight, wanted))
    return left[:, :rank], diagonal[:rank], right[:rank]


def _factor(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    matrix = weight.flatten(1).to(device="cpu", dtype=torch.float64)
    out, width = matrix.shape
    left, upper = matrix.new_zeros(out, rank), matrix.new_zeros(rank, width)
    free = torch.ones(out, dtype=torch.bool)
    smallest = _ZERO * float(matrix.abs().max())
    for j in range(rank):
        column = torch.where(free, matrix[:, j] - left[:, :j] @ upper[:j, j], 0.0)
        size = column.abs()
        largest = float(size.max())
        candidates = free if largest <= smallest else size >= largest * (1 - _LEVEL)
        pivot = int(candidates.to(torch.uint8).argmax())
        if largest > smallest:
            left[:, j] = column / column[pivot]
        left[pivot, j] = 1.0
        upper[j, j:] = matrix[pivot, j:] - left[pivot, :j] @ upper[:j, j:]
        free[pivot] = False
    diagonal = upper.diagonal().clone()
    no_pivot = diagonal.abs() <= smallest
    no_row = upper.abs().amax(1) <= smallest
    upper = upper / torch.where(no_pivot, 1.0, diagonal)[:, None]
    upper[no_row] = torch.eye(rank, width, dtype=matrix.dtype)[no_row]
    diagonal = torch.where(no_row, 0.0, torch.where(no_pivot, 1.0, diagonal))
    return left.float(), diagonal.float(), upper.float()
