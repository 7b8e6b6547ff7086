"""Looking at the gradient of a weight that is not there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

__all__ = ["DenseGradient"]


class DenseGradient(Function):
    """`y`, whose backward pass shows the gradient of a weight that would map x to y.

    Arguments of `apply`: y; x; a scalar that requires a gradient and gets zero; what is told; shape of the weight;
    stride, padding, dilation and groups of a convolution, None for a Linear.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        anchor: Tensor,
        note: Callable[[Tensor], None],
        shape: tuple[int, ...],
        geometry: tuple[Any, ...] | None,
    ) -> Tensor:
        """A view."""
        ctx.save_for_backward(x)
        ctx.plan = note, shape, geometry
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The dense gradient lives until it is noted."""
        (x,) = ctx.saved_tensors
        note, shape, geometry = ctx.plan
        with torch.no_grad():
            wide = torch.promote_types(grad.dtype, torch.float32)
            if geometry is None:
                note(grad.reshape(-1, grad.shape[-1]).to(wide).T @ x.reshape(-1, x.shape[-1]).to(wide))
            else:
                *window, groups = geometry
                weight = x.new_zeros(shape, dtype=wide)
                note(
                    torch.ops.aten.convolution_backward(
                        grad.to(wide), x.to(wide), weight, None, *window, False, (0, 0), groups, (False, True, False)
                    )[1]
                )
        return grad, None, grad.new_zeros(()), None, None, None
