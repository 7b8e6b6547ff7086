"""The nuclear norm of the weight changes: keeps them of low rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from autopeft.core.contracts import Inserted, StepState, Task, Term
from autopeft.errors import UsageError
from autopeft.methods.base import Adapter
from autopeft.regularisers._changes import additive, exactly, note_nothing
from autopeft.regularisers._draw import generator_at
from autopeft.regularisers._term import BaseTerm, check_weight

__all__ = ["Estimator", "NuclearNorm"]

Estimator = Literal["all", "one"]
"""Which weights are looked at in a step."""


@dataclass(frozen=True, slots=True)
class NuclearNorm:
    """Adds `weight * sum over weights of ||delta W||_*`, the sum of the singular values of each change.

    Every option that adds something to a weight takes part; a convolution's change is flattened to (out, in / groups *
    kh * kw). Source: SaRA (Hu et al., 2024, arXiv 2409.06633, section 3.3), which keeps sparse changes of low rank; its
    code looks at one weight per step. The subgradient is `U V^T` over the singular values that are not zero, so that a
    change of zero stays where it is.

    Attributes:
        weight: lambda of the paper; 0 switches it off.
        estimator: `all` sums over every weight in every step; `one` adds the norm of one weight that is drawn anew in
            each step, on average `all` divided by the number of weights, as SaRA was released.
        min_side: weights whose smaller side is below it are left out; SaRA as released has 65.
    """

    weight: float = 5e-4
    estimator: Estimator = "all"
    min_side: int = 1

    def __post_init__(self) -> None:
        check_weight("nuclear_norm", self.weight)
        if self.estimator not in get_args(Estimator):
            raise UsageError(
                f"nuclear_norm: estimator must be one of {', '.join(get_args(Estimator))}, got {self.estimator!r}"
            )
        if self.min_side < 1:
            raise UsageError(f"nuclear_norm: min_side must be at least 1, got {self.min_side!r}")

    def begin(self, inserted: Inserted, task: Task, seed: int) -> Term:
        """Find the weights that are changed additively."""
        if not self.weight:
            return BaseTerm()
        adapters = [a for a in additive(inserted, matrices=True) if _small_side(a) >= self.min_side]
        if not adapters:
            note_nothing("nuclear_norm", "an additive change of a weight of that size")
            return BaseTerm()
        return _Sum(self, adapters, seed)


class _Sum(BaseTerm):
    """Norms of all changes, or of one that is drawn."""

    def __init__(self, settings: NuclearNorm, adapters: list[Adapter], seed: int) -> None:
        self._settings = settings
        self._adapters = adapters
        self._seed = seed

    def add(self, state: StepState) -> Tensor | None:
        """The weighted norms."""
        chosen = self._adapters
        if self._settings.estimator == "one":
            chosen = [chosen[int(torch.randint(len(chosen), (), generator=generator_at(self._seed, state.step)))]]
        return self._settings.weight * torch.stack([_norm(adapter) for adapter in chosen]).sum()


def _small_side(adapter: Adapter) -> int:
    return min(adapter.site.shape[0], adapter.site.n_weight // adapter.site.shape[0])


def _norm(adapter: Adapter) -> Tensor:
    with exactly(next(adapter.parameters())):
        norm: Tensor = _Nuclear.apply(adapter.delta()["weight"].flatten(1), adapter.low_rank())
        return norm


class _Nuclear(Function):
    """Sum of the singular values of a matrix, with the subgradient of least norm.

    Arguments of `apply`: the matrix (n, m); `(down, up)` with `up @ down` equal to it where that is known, which makes
    the decomposition one of (r, r), or None.
    """

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, factors: tuple[Tensor, Tensor] | None) -> Tensor:
        """The sum, a scalar; NaN for a matrix that is not finite."""
        if not matrix.isfinite().all():
            # The training has diverged; whoever watches the losses says so better than a decomposition that fails.
            ctx.save_for_backward(torch.full_like(matrix, torch.nan))
            return matrix.new_full((), torch.nan)
        u, values, vh = _factored(*factors) if factors is not None else _compressed(matrix)
        # What is left of a singular value of zero after rounding has directions that mean nothing.
        kept = values > values.sum() * max(matrix.shape) * torch.finfo(values.dtype).eps
        ctx.save_for_backward((u * kept) @ vh)
        return values.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """`U V^T`, times the incoming gradient."""
        (direction,) = ctx.saved_tensors
        return grad * direction, None


def _factored(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Singular vectors and values of `up @ down`: those of a small square between two orthonormal bases."""
    left, small_left = torch.linalg.qr(up)
    right, small_right = torch.linalg.qr(down.T)
    u, values, vh = torch.linalg.svd(small_left @ small_right.T, full_matrices=False)
    return left @ u, values, vh @ right.T


def _compressed(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Singular vectors and values, from the rows and columns that are not zero alone."""
    rows, columns = (matrix != 0).any(1), (matrix != 0).any(0)
    u, values, vh = torch.linalg.svd(matrix[rows][:, columns], full_matrices=False)
    full_u, full_vh = matrix.new_zeros(len(matrix), len(values)), matrix.new_zeros(len(values), matrix.shape[1])
    full_u[rows], full_vh[:, columns] = u, vh
    return full_u, values, full_vh
