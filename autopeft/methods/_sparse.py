"""Products with a few chosen weight entries, whose backward gathers instead of making a dense weight gradient."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

__all__ = ["SparseConv", "SparseLinear"]

_CHUNK = 1 << 22
"""Scalars in one gathered block of the backward."""


class SparseLinear(Function):
    """`x @ S^T` for S with values at `(row_of, col_of)` among its touched rows and columns alone.

    Arguments of `apply`: x (..., in); values (n,); row_of, col_of (n,): position of each entry among the touched rows
    and columns; row_count: number of touched rows; columns: the touched columns of x, increasing. The result is
    (..., row_count).

    The dense block of touched rows times touched columns lives only inside of forward and backward, and is never
    larger than the weight. The gradient of the values takes n times tokens multiplications, in blocks of bounded size.
    The backward is itself differentiable.
    """

    @staticmethod
    def forward(x: Tensor, values: Tensor, row_of: Tensor, col_of: Tensor, row_count: int, columns: Tensor) -> Tensor:
        """Two gathers and one product."""
        block = _block(values, row_of, col_of, row_count, len(columns)).to(x.dtype)
        return F.linear(x.index_select(-1, columns), block)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the input itself and the indices; nothing of the size of the weight."""
        x, values, row_of, col_of, ctx.row_count, columns = inputs
        ctx.save_for_backward(x, values, row_of, col_of, columns)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        """Gradients of x (dense) and of the values (gathered)."""
        x, values, row_of, col_of, columns = ctx.saved_tensors
        grad_x = grad_values = None
        if ctx.needs_input_grad[0]:
            block = _block(values, row_of, col_of, ctx.row_count, len(columns)).to(grad.dtype)
            grad_x = torch.zeros_like(x).index_add(-1, columns, (grad @ block).to(x.dtype))
        if ctx.needs_input_grad[1]:
            grad_values = _gathered(
                grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1]), row_of, columns[col_of], values.dtype
            )
        return grad_x, grad_values, None, None, None, None


class SparseConv(Function):
    """`conv2d(x, S)` for S zero but for values at flat positions.

    Arguments of `apply`: x (batch, channels, height, width); values (n,); index (n,): flat positions in the kernel;
    shape of the kernel; stride, padding (numbers), dilation, groups. The dense kernel and its gradient live only
    inside of forward and backward.
    """

    @staticmethod
    def forward(
        x: Tensor,
        values: Tensor,
        index: Tensor,
        shape: tuple[int, ...],
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        dilation: tuple[int, ...],
        groups: int,
    ) -> Tensor:
        """One convolution."""
        return F.conv2d(x, _kernel(values, index, shape).to(x.dtype), None, stride, padding, dilation, groups)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the input itself and the positions."""
        x, values, index, ctx.shape, *ctx.geometry = inputs
        ctx.save_for_backward(x, values, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None, None, None]:
        """Gradients of x (dense) and of the values (taken from the kernel's)."""
        x, values, index = ctx.saved_tensors
        grad_x = grad_values = None
        stride, padding, dilation, groups = ctx.geometry
        kernel = _kernel(values, index, ctx.shape).to(grad.dtype)
        wanted = (*ctx.needs_input_grad[:2], False)
        full_x, full_kernel, _ = torch.ops.aten.convolution_backward(
            grad, x.to(grad.dtype), kernel, None, stride, padding, dilation, False, (0, 0), groups, wanted
        )
        if ctx.needs_input_grad[0]:
            grad_x = full_x.to(x.dtype)
        if ctx.needs_input_grad[1]:
            grad_values = full_kernel.flatten().index_select(0, index).to(values.dtype)
        return grad_x, grad_values, None, None, None, None, None, None


def _block(values: Tensor, row_of: Tensor, col_of: Tensor, rows: int, columns: int) -> Tensor:
    return values.new_zeros(rows, columns).index_put((row_of, col_of), values)


def _kernel(values: Tensor, index: Tensor, shape: tuple[int, ...]) -> Tensor:
    return values.new_zeros(torch.Size(shape).numel()).index_put((index,), values).view(shape)


def _gathered(grad: Tensor, x: Tensor, rows: Tensor, columns: Tensor, dtype: torch.dtype) -> Tensor:
    """`sum over tokens of grad[:, rows[i]] * x[:, columns[i]]` for every i."""
    step = max(1, _CHUNK // max(1, len(x)))
    parts = [
        (grad.index_select(1, rows[i : i + step]).to(dtype) * x.index_select(1, columns[i : i + step]).to(dtype)).sum(0)
        for i in range(0, len(rows), step)
    ]
    return torch.cat(parts)
