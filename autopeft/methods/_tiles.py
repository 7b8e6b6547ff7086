"""Products with a kernel's sparse change of a weight, of which never more than some columns exist at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from autopeft.core.site import Site
from autopeft.methods._bracket import Bracket
from autopeft.methods._kernels import Kernel, KernelTiles
from autopeft.methods._snell_triton import fused_tiles
from autopeft.methods._sparsifiers import Cut, Sparsifier, dense_cut, streamed_cut

__all__ = ["Change", "DenseProduct", "Geometry", "TiledProduct"]


_SHARE = 2
"""Scalars of an input or output for each scalar of a panel."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """How a weight acts on an input, and how it is cut into columns.

    Attributes:
        shape: of the weight, `(out, in)` or `(out, in / groups, kh, kw)`.
        groups: groups of the convolution.
        window: stride, padding and dilation of the convolution; None for a Linear.
    """

    shape: tuple[int, ...]
    groups: int = 1
    window: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]] | None = None

    @classmethod
    def of(cls, site: Site, host: nn.Module) -> Geometry:
        """That of a site on its host. The padding of a convolution must be numbers."""
        if isinstance(host, nn.Conv2d):
            assert not isinstance(host.padding, str)
            return cls(site.shape, site.groups, (host.stride, host.padding, host.dilation))
        return cls(site.shape)

    @property
    def columns(self) -> int:
        """Columns of the weight as a matrix."""
        return torch.Size(self.shape[1:]).numel()

    def scalars(self, x: Tensor) -> int:
        """Scalars of the input or of the output, whichever has more; strides count as 1."""
        channels = self.groups * self.shape[1] if len(self.shape) > 2 else self.shape[1]
        return x.numel() // channels * max(channels, self.shape[0])

    def panels(self, entries: int) -> Iterator[tuple[int, int]]:
        """First and last column, exclusive, of panels of about so many entries; whole input channels each."""
        kernel = torch.Size(self.shape[2:]).numel()
        return _ranges(0, self.columns, kernel * max(1, entries // (self.shape[0] * kernel)))

    def tiles(self, start: int, stop: int, entries: int) -> Iterator[tuple[int, int]]:
        """First and last column, exclusive, of tiles of about so many entries."""
        return _ranges(start, stop, max(1, entries // self.shape[0]))

    def product(self, x: Tensor, weight: Tensor, start: int, stop: int, out: Tensor | None) -> Tensor:
        """`weight @ x[columns]`, added to `out` in its place when there is one."""
        if self.window is None:
            part = x[:, start:stop]
            return torch.mm(part, weight.T) if out is None else out.addmm_(part, weight.T)
        y = F.conv2d(self._channels(x, start, stop), self._kernel(weight), None, *self.window, self.groups)
        return y if out is None else out.add_(y)

    def pull_input(self, grad: Tensor, x: Tensor, weight: Tensor, start: int, stop: int, into: Tensor) -> None:
        """Write the gradient of these columns of x to its place in `into`."""
        if self.window is None:
            torch.mm(grad, weight, out=into[:, start:stop])
            return
        found = self._convolution(grad, x, self._kernel(weight), start, stop, (True, False, False))[0]
        self._view(into, start, stop).copy_(found.reshape(len(x), self.groups, -1, *x.shape[2:]))

    def pull_weight(self, grad: Tensor, x: Tensor, start: int, stop: int, into: Tensor) -> Tensor:
        """The gradient of these columns of the weight, (out, stop - start); of a Linear in `into`."""
        if self.window is None:
            return torch.mm(grad.T, x[:, start:stop], out=into)
        kernel = grad.new_empty(self.shape[0], stop - start)
        return self._convolution(grad, x, self._kernel(kernel), start, stop, (False, True, False))[1].flatten(1)

    def _convolution(
        self, grad: Tensor, x: Tensor, kernel: Tensor, start: int, stop: int, wanted: tuple[bool, bool, bool]
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert self.window is not None
        found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(
            grad, self._channels(x, start, stop), kernel, None, *self.window, False, (0, 0), self.groups, wanted
        )
        return found

    def _view(self, x: Tensor, start: int, stop: int) -> Tensor:
        """(batch, groups, channels of the tile, height, width)."""
        kernel = torch.Size(self.shape[2:]).numel()
        return x.view(len(x), self.groups, self.shape[1], *x.shape[2:])[:, :, start // kernel : stop // kernel]

    def _channels(self, x: Tensor, start: int, stop: int) -> Tensor:
        if stop - start == self.columns:
            return x
        return self._view(x, start, stop).flatten(1, 2)

    def _kernel(self, weight: Tensor) -> Tensor:
        return weight.view(len(weight), -1, *self.shape[2:])


@dataclass(frozen=True, slots=True)
class Change:
    """What is applied to a pair of factors.

    Attributes:
        kernel: makes entries of them.
        sparsifier: zeroes some and shapes the rest.
        kept: how many entries stay; all with sparsifier `none`.
        learn: whether the kernel's scalars need gradients.
        tile: about how many entries of the kernel are worked on at a time: what a cache holds.
        panel: how many entries of the changed weight exist at a time, at most: what one product takes in.
        fused: whether a tile may be one launch on CUDA.
    """

    kernel: Kernel
    sparsifier: Sparsifier
    kept: int
    learn: bool
    tile: int
    panel: int
    fused: bool = False

    def tiles(self, A: Tensor, B: Tensor, s: Tensor) -> KernelTiles:
        """The kernel of one pass over tiles, in the fastest way that these factors allow."""
        fused = fused_tiles(self.kernel, A, B, s, self.learn) if self.fused else None
        return fused or self.kernel.tiles(A, B, s, learn=self.learn)

    def dense(self, A: Tensor, B: Tensor, s: Tensor, offset: Tensor | None, cut: Cut | None = None) -> Tensor:
        """The whole change (out, in), differentiable but for the cut."""
        kernel = self.kernel.value(A, B, s)
        if cut is None and self.sparsifier.name != "none":
            cut = dense_cut(kernel, self.kept)
        return self.sparsifier.apply(kernel, cut, 0, offset)

    def cut(self, A: Tensor, B: Tensor, s: Tensor, geometry: Geometry, bracket: Bracket | None = None) -> Cut | None:
        """The cut of these factors, found in passes over tiles; None where no entry is zeroed."""
        if self.sparsifier.name == "none":
            return None
        with torch.no_grad(), _full_precision(A):
            tiles = self.tiles(A, B, s)

            def sweep() -> Iterator[Tensor]:
                return (tiles.value(*columns) for columns in geometry.tiles(0, geometry.columns, self.tile))

            return streamed_cut(sweep, len(A) * len(B), self.kept, A, bracket)


class TiledProduct(Function):
    """`(W + change) @ x`, the change made, used and dropped a few columns at a time, forwards and backwards.

    Arguments of `apply`: x; the factors A (in, r) and B (out, r), float32 or float64; the kernel's scalars; the offset
    (in,) or None; W as a matrix or None for the change alone; a bias or None; `Change`; `Geometry`; the cut or None.
    With W, the sum is made in the factors' precision, which must be that of x: in less, the small change would be
    rounded away. W and the bias are constants. Kept for the backward: the arguments alone.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        s: Tensor,
        offset: Tensor | None,
        base: Tensor | None,
        bias: Tensor | None,
        change: Change,
        geometry: Geometry,
        cut: Cut | None,
    ) -> Tensor:
        """One product in as many parts as there are tiles."""
        ctx.save_for_backward(x, A, B, s, offset, base, None if cut is None else cut.level)
        ctx.plan = change, geometry, None if cut is None else cut.bound
        flat = x if geometry.window is not None else x.reshape(-1, x.shape[-1])
        out: Tensor | None = None
        with _full_precision(x):
            work = _Panels(change, geometry, A, B, s, offset, base, cut, x)
            for start, stop in work:
                weight = work.weight(start, stop)
                if out is None and bias is not None and geometry.window is None:
                    out = torch.addmm(bias, flat[:, start:stop], weight.T)
                else:
                    out = geometry.product(flat, weight, start, stop, out)
        assert out is not None
        if geometry.window is None:
            return out.view(*x.shape[:-1], -1)
        return out if bias is None else out.add_(bias[:, None, None])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Every tile is made once more; the cut is kept."""
        x, A, B, s, offset, base, level = ctx.saved_tensors
        change, geometry, bound = ctx.plan
        cut = None if level is None else Cut(level, bound)
        grad, flat = grad.to(x.dtype), x
        if geometry.window is None:
            grad, flat = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        into = torch.empty_like(flat, memory_format=torch.contiguous_format) if ctx.needs_input_grad[0] else None
        with _full_precision(x):
            work = _Panels(change, geometry, A, B, s, offset, base, cut, x)
            for start, stop in work:
                found = geometry.pull_weight(grad, flat, start, stop, work.buffer(start, stop))
                weight = work.weight(start, stop, found)
                if into is not None:
                    geometry.pull_input(grad, flat, weight, start, stop, into)
            factors = work.tiles.gradients()
        return None if into is None else into.view_as(x), *factors, None, None, None, None, None, None


class _Panels:
    """The changed weight, panel by panel, and the gradients of its factors."""

    def __init__(
        self,
        change: Change,
        geometry: Geometry,
        A: Tensor,
        B: Tensor,
        s: Tensor,
        offset: Tensor | None,
        base: Tensor | None,
        cut: Cut | None,
        x: Tensor,
    ) -> None:
        self.tiles = change.tiles(A, B, s)
        self._change, self._geometry = change, geometry
        self._offset, self._base, self._cut = offset, base, cut
        self._outputs = len(B)
        # A panel much smaller than the activations does not show beside them.
        entries = min(change.panel, max(change.tile, geometry.scalars(x) // _SHARE))
        self._ranges = tuple(geometry.panels(entries))
        width = max(stop - start for start, stop in self._ranges)
        self._buffer = x.new_empty(self._outputs * width)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self._ranges)

    def buffer(self, start: int, stop: int) -> Tensor:
        """Where `weight` puts these columns, (out, n)."""
        return self._buffer[: self._outputs * (stop - start)].view(self._outputs, -1)

    def weight(self, start: int, stop: int, grad: Tensor | None = None) -> Tensor:
        """Some columns of the changed weight, (out, n), good until the next call.

        Args:
            start: first column.
            stop: last column, exclusive.
            grad: the gradient of these columns, to take in; may lie in the buffer, which is overwritten tile by tile
                once it has been read.
        """
        out = self.buffer(start, stop)
        sparsifier, cut = self._change.sparsifier, self._cut
        for first, last in self._geometry.tiles(start, stop, self._change.tile):
            part = None if self._offset is None else self._offset[first:last]
            here = slice(first - start, last - start)
            tile = self.tiles.change(first, last, sparsifier, cut, part, None if grad is None else grad[:, here])
            if self._base is None:
                out[:, here].copy_(tile)
            else:
                torch.add(tile, self._base[:, first:last], out=out[:, here])
        return out


class DenseProduct(Function):
    """The same from the whole change by automatic differentiation: the oracle, and no slower where tiles are few.

    Arguments of `apply`: x, A, B, the scalars, the offset or None, `Change`, `Geometry`. The dense change lives inside
    of forward and backward.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, A: Tensor, B: Tensor, s: Tensor, offset: Tensor | None, change: Change, geometry: Geometry
    ) -> Tensor:
        """The change, then one product."""
        ctx.save_for_backward(x, A, B, s, offset)
        ctx.plan = change, geometry
        with _full_precision(x):
            return _apply(x, change.dense(A, B, s, offset), geometry)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The forward once more, with a graph."""
        *inputs, offset = ctx.saved_tensors
        change, geometry = ctx.plan
        with torch.enable_grad(), _full_precision(grad):
            leaves = [t.detach().requires_grad_(n) for t, n in zip(inputs, ctx.needs_input_grad, strict=False)]
            y = _apply(leaves[0], change.dense(*leaves[1:], offset), geometry)
            found = iter(torch.autograd.grad(y, [t for t in leaves if t.requires_grad], grad.to(y.dtype)))
        return *(next(found) if t.requires_grad else None for t in leaves), None, None, None


def _apply(x: Tensor, change: Tensor, geometry: Geometry) -> Tensor:
    change = change.to(x.dtype).view(geometry.shape)
    if geometry.window is None:
        return F.linear(x, change)
    return F.conv2d(x, change, None, *geometry.window, geometry.groups)


def _ranges(start: int, stop: int, width: int) -> Iterator[tuple[int, int]]:
    return ((first, min(first + width, stop)) for first in range(start, stop, width))


def _full_precision(like: Tensor) -> torch.autocast:
    """Autocast would run the kernel's products in fewer digits than a small change has."""
    return torch.autocast(device_type=like.device.type, enabled=False)
