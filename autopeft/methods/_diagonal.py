"""A weight change that is diagonal between two frozen bases."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from autopeft.core.site import Site
from autopeft.errors import UsageError
from autopeft.methods._low_rank import LowRankAdapter

__all__ = ["DiagonalAdapter", "diagonal_energies"]


class DiagonalAdapter(LowRankAdapter):
    """`left diag(change()) right`, with `left` (out_features, r) and `right` (r, in_features) not saved.

    With few atoms the change runs beside the host, two thin products per token. With so many that these cost more than
    the dense weight's gradient does, the host runs with its changed weight instead.
    """

    left: Tensor
    right: Tensor

    def __init__(self, site: Site, host: nn.Module, rank: int) -> None:
        thin = 2 * rank * (site.in_features + site.out_features) < site.n_weight
        super().__init__(site, host, thin=thin)

    def keep_bases(self, like: Tensor, left: Tensor, right: Tensor) -> None:
        """Copy the bases to the device and dtype of `like`."""
        self.register_buffer("left", left.to(like, copy=True), persistent=False)
        self.register_buffer("right", right.to(like, copy=True), persistent=False)

    def change(self) -> Tensor:
        """The diagonal (r,), with gradient; exactly zero at the start."""
        raise NotImplementedError(f"{type(self).__name__} of {self.site.name} has no diagonal")

    def branch(self, x: Tensor) -> Tensor:
        """As the base class says, at rank r in both products."""
        return self.expand(self.contract(x, self.right), self.left * self.change())

    def delta(self) -> dict[str, Tensor]:
        """`left diag(change) right` as a tensor of the site's shape."""
        return {"weight": ((self.left * self.change()) @ self.right).view(self.site.shape)}

    def low_rank(self) -> tuple[Tensor, Tensor] | None:
        """`(right, left diag(change))`."""
        return self.right.clone(), (self.left * self.change().detach())


def diagonal_energies(signal: Tensor, u: Tensor, v: Tensor, sizes: Sequence[int]) -> Tensor:
    """`(u_i^T S v_i)^2` for the first `max(sizes)` pairs, float64: the energy along each atom of orthonormal bases.

    Args:
        signal: S, flattened to (out, in).
        u: (out, m).
        v: (in, m).
        sizes: which sizes are asked about.
    """
    rank = min(max(sizes), u.shape[1])
    matrix = signal.detach().flatten(1).to(device="cpu", dtype=torch.promote_types(signal.dtype, torch.float32))
    if matrix.shape != (len(u), len(v)):
        raise UsageError(
            f"the signal is of shape {tuple(matrix.shape)} and the bases of {(len(u), len(v))}; the evidence belongs "
            f"to another weight"
        )
    u, v = u.to(matrix.dtype), v.to(matrix.dtype)
    return (u[:, :rank] * (matrix @ v[:, :rank])).double().sum(0).square()
