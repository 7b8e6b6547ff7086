"""Random projections that are held as they are: dense and sparse."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from autopeft.methods._fastfood import Projection

__all__ = ["DenseProjection", "SparseProjection"]


class DenseProjection(Projection):
    """Every entry Gaussian, columns divided by their norm; holds total * size numbers."""

    matrix: Tensor

    def draw(self, seed: int, device: torch.device) -> None:
        """As the base class says."""
        generator = torch.Generator().manual_seed(seed)
        matrix = torch.randn(self.total, self.size, generator=generator)
        matrix /= torch.linalg.vector_norm(matrix, dim=0)
        self.register_buffer("matrix", matrix.to(device), persistent=False)

    def rows(self, z: Tensor, start: int, stop: int) -> Tensor:
        """As the base class says."""
        return self.matrix[start:stop].to(z.dtype) @ z


class SparseProjection(Projection):
    """About sqrt(total) entries of a column, +v or -v at random rows (very sparse projections, Li et al., 2006).

    A row may be drawn twice for one column; the signs are independent, so that the squared norm is 1 in expectation.
    Holds 2 * sqrt(total) * size whole numbers, sorted by row.
    """

    row: Tensor
    column: Tensor

    def __init__(self, total: int, size: int) -> None:
        super().__init__(total, size)
        self.per_column = max(1, round(math.sqrt(total)))
        self._edges: dict[int, int] = {}

    def draw(self, seed: int, device: torch.device) -> None:
        """As the base class says."""
        generator = torch.Generator().manual_seed(seed)
        shape = (self.size, self.per_column)
        row = torch.randint(0, self.total, shape, generator=generator).flatten()
        signs = torch.randint(0, 2, shape, generator=generator).flatten()
        column = torch.arange(self.size).repeat_interleave(self.per_column)
        order = row.argsort(stable=True)
        # The sign lives in the column's: column c stands for +z_c, size + c for -z_c.
        column = (column + self.size * signs)[order]
        self._edges.clear()
        self.register_buffer("row", row[order].to(device, torch.int32), persistent=False)
        self.register_buffer("column", column.to(device, torch.int32), persistent=False)

    def rows(self, z: Tensor, start: int, stop: int) -> Tensor:
        """As the base class says."""
        first, last = self._edge(start), self._edge(stop)
        value = torch.cat((z, -z)) / math.sqrt(self.per_column)
        chosen = value.index_select(0, self.column[first:last])
        return z.new_zeros(stop - start).index_add(0, self.row[first:last] - start, chosen)

    def _edge(self, start: int) -> int:
        """Position of the first entry in this row or after it, looked up once: it waits for the device."""
        if start not in self._edges:
            self._edges[start] = int(torch.searchsorted(self.row, torch.tensor(start, device=self.row.device)))
        return self._edges[start]
