"""Products with a few chosen weight entries, whose backward computes their own gradients alone.

Which way is taken at which density was measured: `studies/kernels/density.py`.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

__all__ = ["SparseConv", "SparseLinear", "compressible", "gathered_conv"]

_CHUNK = 1 << 20
"""Scalars in one gathered block of the backward, at most."""

_SHARE = 32
"""Scalars of an input for each scalar of a gathered block, which then does not show beside it."""

_CSR_DENSITY = 0.02
"""Largest share of a weight's entries for which a compressed product is cheaper than a dense one."""

_GATHER_DENSITY = 0.0005
"""Largest share of a weight's entries whose gradients are cheaper by gathering than by a sampled product."""

_CONV_DENSITY = 0.005
"""Largest share of a kernel's entries whose gradients are cheaper one by one than from the whole kernel's."""


class SparseLinear(Function):
    """`x @ S^T` for S with values at `(row_of, col_of)` among its touched rows and columns alone.

    Arguments of `apply`: x (..., in); values (n,); row_of, col_of (n,): position of each entry among the touched rows
    and columns; row_count: number of touched rows; columns: the touched columns of x, increasing. The result is
    (..., row_count).

    On the CPU, products are of a compressed matrix while it has few entries, and gradients of the entries are sampled
    products: n times tokens multiplications each. Elsewhere, and in half precision, the dense block of touched rows
    times touched columns lives inside of forward and backward, never larger than the weight, and gradients of the
    entries take as many multiplications on gathered columns, in blocks of bounded size. No gradient of a whole weight
    is ever computed, and nothing of a weight's size is kept. The backward is itself differentiable.
    """

    @staticmethod
    def forward(x: Tensor, values: Tensor, row_of: Tensor, col_of: Tensor, row_count: int, columns: Tensor) -> Tensor:
        """One product."""
        if compressible(x, values) and len(values) <= _CSR_DENSITY * row_count * x.shape[-1]:
            return _product(x, values, row_of, columns[col_of], row_count)
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
        # What is compressed is not differentiable again.
        compressed = not torch.is_grad_enabled() and grad.dtype == x.dtype and compressible(x, values)
        if ctx.needs_input_grad[0]:
            if compressed and len(values) <= _CSR_DENSITY * ctx.row_count * x.shape[-1]:
                grad_x = _product(grad, values, columns[col_of], row_of, x.shape[-1])
            else:
                block = _block(values, row_of, col_of, ctx.row_count, len(columns)).to(grad.dtype)
                grad_x = torch.zeros_like(x).index_add(-1, columns, (grad @ block).to(x.dtype))
        if ctx.needs_input_grad[1]:
            flat, flat_x = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
            few = len(values) <= _GATHER_DENSITY * ctx.row_count * x.shape[-1]
            entries = _sampled if compressed and not few else _gathered
            grad_values = entries(flat, flat_x, row_of, columns[col_of], values.dtype)
        return grad_x, grad_values, None, None, None, None


class SparseConv(Function):
    """`conv2d(x, S)` for S zero but for values at flat positions.

    Arguments of `apply`: x (batch, channels, height, width); values (n,); index (n,): flat positions in the kernel;
    shape of the kernel; stride, padding (numbers), dilation, groups. The dense kernel lives only inside of forward and
    backward; so does its gradient, which is computed for many values alone. The backward is itself differentiable.
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
        """Gradients of x (dense) and of the values (gathered while they are few, else taken from the kernel's)."""
        x, values, index = ctx.saved_tensors
        grad_x = grad_values = None
        stride, padding, dilation, groups = ctx.geometry
        few = len(values) <= _CONV_DENSITY * torch.Size(ctx.shape).numel()
        wanted = (ctx.needs_input_grad[0], ctx.needs_input_grad[1] and not few, False)
        if any(wanted):
            kernel = _kernel(values, index, ctx.shape).to(grad.dtype)
            full_x, full_kernel, _ = torch.ops.aten.convolution_backward(
                grad, x.to(grad.dtype), kernel, None, stride, padding, dilation, False, (0, 0), groups, wanted
            )
            if wanted[0]:
                grad_x = full_x.to(x.dtype)
            if wanted[1]:
                grad_values = full_kernel.flatten().index_select(0, index).to(values.dtype)
        if ctx.needs_input_grad[1] and few:
            grad_values = gathered_conv(grad, x, index, ctx.shape, stride, padding, dilation, groups, values.dtype)
        return grad_x, grad_values, None, None, None, None, None, None


def _block(values: Tensor, row_of: Tensor, col_of: Tensor, rows: int, columns: int) -> Tensor:
    return values.new_zeros(rows, columns).index_put((row_of, col_of), values)


def _kernel(values: Tensor, index: Tensor, shape: tuple[int, ...]) -> Tensor:
    return values.new_zeros(torch.Size(shape).numel()).index_put((index,), values).view(shape)


def compressible(x: Tensor, values: Tensor) -> bool:
    """Whether MKL, which knows two types, multiplies compressed matrices here."""
    return (
        x.device.type == "cpu"
        and x.dtype == values.dtype
        and x.dtype in (torch.float32, torch.float64)
        and len(values) > 0
        and x.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]  # torch does not type it
    )


def _product(x: Tensor, values: Tensor, row: Tensor, column: Tensor, rows: int) -> Tensor:
    """`x @ S^T`, x (..., columns), for S (rows, columns) with values at distinct (row, column): (..., rows)."""
    order = torch.argsort(row * x.shape[-1] + column)
    matrix = _csr(values[order], row[order], column[order], (rows, x.shape[-1]))
    flat = x.reshape(-1, x.shape[-1])
    product = flat.new_zeros(len(flat), rows)
    # Written where it is wanted: its own result would be laid out the other way round.
    torch.addmm(product.mT, matrix, flat.mT, beta=0, out=product.mT)
    return product.view(*x.shape[:-1], rows)


def _sampled(grad: Tensor, x: Tensor, rows: Tensor, columns: Tensor, dtype: torch.dtype) -> Tensor:
    """As `_gathered`, in products that compute these entries alone; grad and x are of one type, `dtype`."""
    order = torch.argsort(rows * x.shape[-1] + columns)
    zeros = torch.zeros(len(order), dtype=dtype, device=x.device)
    found = _csr(zeros, rows[order], columns[order], (grad.shape[-1], x.shape[-1]))
    # A few tokens at a time: torch copies both factors.
    step = max(1, _CHUNK // (grad.shape[-1] + x.shape[-1]))
    for i in range(0, len(x), step):
        found = torch.sparse.sampled_addmm(found, grad[i : i + step].mT, x[i : i + step])
    return zeros.index_copy(0, order, found.values())


def _csr(values: Tensor, row: Tensor, column: Tensor, shape: tuple[int, int]) -> Tensor:
    """The compressed matrix of values ordered by row."""
    _announce()
    starts = torch.searchsorted(row, torch.arange(shape[0] + 1, device=row.device))
    return torch.sparse_csr_tensor(starts, column, values, shape, check_invariants=False)


@functools.cache
def _announce() -> None:
    """Let torch say unheard, once per process, that its compressed matrices are new."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(torch.tensor([0, 1]), torch.tensor([0]), torch.zeros(1), (1, 1))


def gathered_conv(
    grad: Tensor,
    x: Tensor,
    index: Tensor,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
    dtype: torch.dtype,
) -> Tensor:
    """The gradient of the kernel's entries at flat positions, in their own number times output pixels.

    Args:
        grad: gradient of the output, (batch, out, height, width).
        x: the input.
        index: (n,) positions.
        shape: of the kernel, (out, in / groups, height, width).
        stride: as of `conv2d`, a pair of numbers.
        padding: likewise.
        dilation: likewise.
        groups: as of `conv2d`.
        dtype: of the products and the result.

    Returns:
        (n,).
    """
    out, inner, height, width = shape
    row, rest = index // (inner * height * width), index % (inner * height * width)
    column = rest // (height * width) + row // (out // groups) * inner
    # Windows are views: every pixel that the kernel sees, (in, kernel height, kernel width, batch, height, width).
    windows = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    for axis, (size, step, gap) in enumerate(zip((height, width), stride, dilation, strict=True), start=2):
        windows = windows.unfold(axis, gap * (size - 1) + 1, step)
    windows = windows[..., :: dilation[0], :: dilation[1]].permute(1, 4, 5, 0, 2, 3)
    ups = grad.movedim(1, 0)
    places = (column, rest // width % height, rest % width)
    step = max(1, _CHUNK // max(1, ups[0].numel()))
    parts = [
        (
            ups.index_select(0, row[i : i + step]).to(dtype)
            * windows[tuple(place[i : i + step] for place in places)].to(dtype)
        ).sum((1, 2, 3))
        for i in range(0, len(index), step)
    ]
    return torch.cat(parts) if parts else grad.new_zeros(0, dtype=dtype)


def _gathered(grad: Tensor, x: Tensor, rows: Tensor, columns: Tensor, dtype: torch.dtype) -> Tensor:
    """`sum over tokens of grad[:, rows[i]] * x[:, columns[i]]` for every i."""
    step = max(1, min(_CHUNK, x.numel() // _SHARE) // max(1, len(x)))
    parts = [
        (grad.index_select(1, rows[i : i + step]).to(dtype) * x.index_select(1, columns[i : i + step]).to(dtype)).sum(0)
        for i in range(0, len(rows), step)
    ]
    return torch.cat(parts)
