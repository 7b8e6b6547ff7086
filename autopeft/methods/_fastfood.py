"""Random projections from few numbers to very many, with columns of unit norm."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

__all__ = ["Fastfood", "Projection", "hadamard"]

_CHUNK = 1 << 22
"""Entries of the permutations that are drawn at once."""


def hadamard(x: Tensor) -> Tensor:
    """The Walsh-Hadamard transform along the last axis, in Sylvester's order, entries +1 and -1, not normalised.

    In place of `x @ H`, n log2(n) additions per row. Applied twice it multiplies by n.

    Args:
        x: (..., n), n a power of 2.
    """
    n = x.shape[-1]
    if n & (n - 1):
        raise ValueError(f"a Walsh-Hadamard transform takes a power of 2, got {n}")
    here, spare = x.contiguous().clone(), torch.empty_like(x, memory_format=torch.contiguous_format)
    half = 1
    while half < n:
        pairs, out = (t.view(*x.shape[:-1], n // (2 * half), 2, half) for t in (here, spare))
        first, second = pairs.unbind(-2)
        torch.add(first, second, out=out.select(-2, 0))
        torch.sub(first, second, out=out.select(-2, 1))
        here, spare = spare, here
        half *= 2
    return here


class Projection(nn.Module):
    """A fixed random matrix P (total, size) that is given by a seed and applied by rows.

    Columns have unit norm, exactly or in expectation. Its tensors are drawn when they are first needed, on the CPU, so
    that they depend on the seed alone; they are no part of the state.

    Args:
        total: rows: entries that are reached.
        size: columns: entries of z.
    """

    def __init__(self, total: int, size: int) -> None:
        super().__init__()
        self.total, self.size = total, size

    def draw(self, seed: int, device: torch.device) -> None:
        """Make the matrix of a seed."""
        raise NotImplementedError(f"{type(self).__name__} draws nothing")

    def rows(self, z: Tensor, start: int, stop: int) -> Tensor:
        """`P[start:stop] @ z`, with gradient.

        Args:
            z: (size,).
            start: the first row.
            stop: the row after the last.

        Returns:
            (stop - start,), in the dtype of z.
        """
        raise NotImplementedError(f"{type(self).__name__} projects nothing")


class Fastfood(Projection):
    """`H G Pi H B` per block of n = 2^l rows (Le et al., 2013; as in Li et al., 2018, arXiv 1804.08838).

    z is padded with zeros to n. Each block has its own B (signs), Pi (a permutation) and G (Gaussian), and H is the
    Walsh-Hadamard matrix. Within a block all columns have the same norm; one factor for all blocks makes it 1, exactly
    where the last block is used whole and in expectation otherwise. Applying it takes total * log2(n) additions, and
    nine bytes are kept per row.
    """

    signs: Tensor
    order: Tensor
    gauss: Tensor

    def __init__(self, total: int, size: int) -> None:
        super().__init__(total, size)
        self.width = 1 << (size - 1).bit_length()
        self.factor = 0.0

    def draw(self, seed: int, device: torch.device) -> None:
        """As the base class says."""
        generator = torch.Generator().manual_seed(seed)
        n = self.width
        blocks = -(-self.total // n)
        signs = torch.randint(0, 2, (blocks, n), generator=generator, dtype=torch.int8) * 2 - 1
        gauss = torch.randn(blocks, n, generator=generator)
        order = torch.empty(blocks, n, dtype=torch.int32)
        step = max(1, _CHUNK // n)
        for first in range(0, blocks, step):
            keys = torch.rand(min(step, blocks - first), n, generator=generator, dtype=torch.float64)
            order[first : first + step] = keys.argsort(dim=1, stable=True)
        used = torch.full((blocks,), n, dtype=torch.float64)
        used[-1] = self.total - (blocks - 1) * n
        self.factor = 1 / math.sqrt(float((used * gauss.double().square().sum(1)).sum()))
        for name, tensor in (("signs", signs), ("order", order), ("gauss", gauss)):
            self.register_buffer(name, tensor.to(device), persistent=False)

    def rows(self, z: Tensor, start: int, stop: int) -> Tensor:
        """As the base class says; nothing of the size of the rows is kept for the backward pass."""
        result: Tensor = _Down.apply(z, self, start, stop)
        return result

    def forward_rows(self, z: Tensor, start: int, stop: int) -> Tensor:
        """`P[start:stop] @ z` without gradient."""
        blocks = slice(start // self.width, -(-stop // self.width))
        x = hadamard(self.signs[blocks].to(z.dtype) * F.pad(z, (0, self.width - self.size)))
        x = x.gather(1, self.order[blocks].long()).mul_(self.gauss[blocks].to(z.dtype))
        skipped = start - blocks.start * self.width
        return hadamard(x).flatten()[skipped : skipped + stop - start] * self.factor

    def backward_rows(self, grad: Tensor, start: int, stop: int) -> Tensor:
        """`P[start:stop]^T @ grad` without gradient: the factors transposed, in the opposite order."""
        blocks = slice(start // self.width, -(-stop // self.width))
        skipped = start - blocks.start * self.width
        left = (blocks.stop - blocks.start) * self.width - skipped - len(grad)
        x = hadamard(F.pad(grad, (skipped, left)).view(-1, self.width)).mul_(self.gauss[blocks].to(grad.dtype))
        x = torch.empty_like(x).scatter_(1, self.order[blocks].long(), x)
        return (hadamard(x) * self.signs[blocks].to(grad.dtype)).sum(0)[: self.size] * self.factor


class _Down(Function):
    """`P[start:stop] @ z`; a linear map, so that its backward is `_Up` and the other way round."""

    @staticmethod
    def forward(z: Tensor, projection: Fastfood, start: int, stop: int) -> Tensor:
        """See `Fastfood.forward_rows`."""
        return projection.forward_rows(z, start, stop)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """The rows alone are needed."""
        _, ctx.projection, ctx.start, ctx.stop = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        """The transposed map."""
        return _Up.apply(grad, ctx.projection, ctx.start, ctx.stop), None, None, None


class _Up(Function):
    """`P[start:stop]^T @ grad`."""

    @staticmethod
    def forward(grad: Tensor, projection: Fastfood, start: int, stop: int) -> Tensor:
        """See `Fastfood.backward_rows`."""
        return projection.backward_rows(grad, start, stop)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """The rows alone are needed."""
        _, ctx.projection, ctx.start, ctx.stop = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        """The map itself."""
        return _Down.apply(grad, ctx.projection, ctx.start, ctx.stop), None, None, None
