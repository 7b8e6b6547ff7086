"""Sums over the gradients of one tensor that tell signal from noise, and its curvature as a Kronecker product."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from autopeft.scoring._moments import Moments

__all__ = ["Agreement", "CurvatureSums", "Frame"]


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far the gradients of different batches agree.

    Attributes:
        energy: U, an unbiased estimate of the squared norm of the true gradient; negative when batches disagree.
        variance: estimated variance of U; infinite when fewer than two batches tell.
    """

    energy: float
    variance: float


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """Coordinates in which a matrix's curvature is diagonal: eigenvectors of its two Kronecker factors.

    With L = E[G G^T] and R = E[G^T G] of the batches' gradients G, F is taken as `L (x) R / tr L` (Gupta, Koren and
    Singer, "Shampoo", ICML 2018; one step of power iteration from the identity towards the best Kronecker product,
    Morwani et al., 2024, arXiv 2406.17748). In the eigenvectors of L and R its entries are `l_i r_j / tr L`.

    Attributes:
        left: orthogonal (out, out), None for the plain rows.
        right: orthogonal (in, in), None for the plain columns.
        curvature: (out, in), not negative, of the same sum as the diagonal.
    """

    left: Tensor | None
    right: Tensor | None
    curvature: Tensor

    def rotate(self, matrix: Tensor) -> Tensor:
        """A matrix (out, in) in these coordinates."""
        if self.left is not None:
            matrix = self.left.T @ matrix
        return matrix if self.right is None else matrix @ self.right

    def restore(self, matrix: Tensor) -> Tensor:
        """The inverse of `rotate`."""
        if self.left is not None:
            matrix = self.left @ matrix
        return matrix if self.right is None else matrix @ self.right.T


class CurvatureSums(Moments):
    """First and second moments, agreement between batches, and Kronecker factors where asked for.

    For batches i of equal size, `U = (|sum g_i|^2 - sum |g_i|^2) / (n (n - 1)) = 2 sum_i m_i / (n (n - 1))` with
    `m_i = g_i^T (g_1 + .. + g_(i-1))`: one product with the running sum per batch. Where gradients are noise the m_i
    are uncorrelated, whatever the noise's covariance, so that `sum m_i^2` estimates the variance of their sum and no
    gradient is kept; with a signal the expected part `(i - 1) U` is taken out first. A last batch of fewer samples
    counts for the moments alone.

    Args:
        shape: shape of the tensor.
        like: a tensor with its type and device.
        halves: whether the first moment is kept for each half of the pass.
        left: whether `sum G G^T` is kept, G the gradient flattened to (out, in).
        right: whether `sum G^T G` is kept.
    """

    def __init__(self, shape: torch.Size, like: Tensor, halves: bool, left: bool, right: bool) -> None:
        super().__init__(shape, like, halves)
        rows = shape[0] if shape else 1
        columns = math.prod(shape[1:])
        self.left = self.second.new_zeros(rows, rows) if left else None
        self.right = self.second.new_zeros(columns, columns) if right else None
        self._weight: float | None = None
        self._products: list[Tensor] = []

    def add(self, gradient: Tensor, weight: float, half: int) -> None:
        """One batch's gradient; see the class."""
        g = gradient.to(self.second.dtype)
        self._weight = self._weight or weight
        if weight == self._weight:
            flat = g.reshape(-1)
            dots = [torch.dot(flat, s.reshape(-1)) for s in self.first]
            self._products.append(torch.stack(dots).double().sum() / weight)
        super().add(gradient, weight, half)
        matrix = g.flatten(1) if self.left is not None or self.right is not None else g
        if self.left is not None:
            self.left.addmm_(matrix, matrix.T)
        if self.right is not None:
            self.right.addmm_(matrix.T, matrix)

    def agreement(self) -> Agreement:
        """U and its variance."""
        n = len(self._products)
        if n < 2:
            return Agreement(0.0, math.inf)
        m = torch.stack(self._products).cpu()
        factor = 2 / (n * (n - 1))
        energy = factor * float(m.sum())
        rest = m - energy * torch.arange(n, dtype=m.dtype)
        return Agreement(energy, factor**2 * float(rest.square().sum()))

    def frame(self, diagonal: Tensor) -> Frame:
        """The coordinates of a matrix, on the CPU; the factors are spent.

        Args:
            diagonal: F, the curvature of the entries, (out, in), on the CPU; its row and column sums stand in for a
                factor that was not kept.
        """
        total = float(diagonal.sum(dtype=torch.float64))
        left, down = _axes(self.left, diagonal.sum(1))
        right, across = _axes(self.right, diagonal.sum(0))
        self.left = self.right = None
        if not total > 0:
            return Frame(None, None, diagonal)
        down, across = (t * (total / float(t.sum(dtype=torch.float64))) for t in (down, across))
        return Frame(left, right, torch.outer(down, across) / total)


def _axes(factor: Tensor | None, sums: Tensor) -> tuple[Tensor | None, Tensor]:
    """Eigenvectors and eigenvalues of a factor; without one, None and what its diagonal would be."""
    if factor is None:
        return None, sums
    values, vectors = torch.linalg.eigh(factor.cpu().double())
    return vectors.to(sums.dtype), values.clamp(min=0).to(sums.dtype)
