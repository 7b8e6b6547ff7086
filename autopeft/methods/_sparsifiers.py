"""Which entries of a kernel are kept, exactly as many as asked for, and what becomes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from typing import Literal

import torch
from torch import Tensor

from autopeft.methods._bracket import Bracket, within

__all__ = ["Cut", "Sparsifier", "SparsifierName", "dense_cut", "kept_entries", "streamed_cut"]

SparsifierName = Literal["soft", "square", "hard", "none"]
"""What becomes of the entries that are kept."""

_DIGIT = 16
"""Bits of a magnitude that one pass over the tiles settles."""

_FEW = 16
"""Entries for each that may be gathered."""


def kept_entries(sparsity: float, entries: int) -> int:
    """`entries - ceil(sparsity * entries)`, computed exactly from the decimal that was written."""
    return entries - ceil(Fraction(str(sparsity)) * entries)


@dataclass(frozen=True, slots=True)
class Cut:
    """Which entries are kept: those above a magnitude, and the first few of those that equal it.

    Entries are numbered input by input: entry (output j, input i) of `out` outputs has number `i * out + j`.

    Attributes:
        level: the largest magnitude that is zeroed, a scalar tensor; 0 when nothing is zeroed.
        bound: entries of exactly this magnitude are kept up to this number, exclusive.
    """

    level: Tensor
    bound: int

    def mask(self, magnitude: Tensor, start: int) -> Tensor:
        """1 where an entry is kept and 0 elsewhere.

        Args:
            magnitude: (out, n), the magnitudes of some columns.
            start: number of the first of these entries.
        """
        out, n = magnitude.shape
        mask = torch.empty_like(magnitude)
        # A comparison that writes numbers runs at the speed of memory; one that writes booleans does not.
        column, row = divmod(min(max(self.bound - start, 0), n * out), out)
        torch.ge(magnitude[:, :column], self.level, out=mask[:, :column])
        if column < n:
            torch.gt(magnitude[:, column:], self.level, out=mask[:, column:])
            torch.ge(magnitude[:row, column], self.level, out=mask[:row, column])
        return mask


@dataclass(frozen=True, slots=True)
class Sparsifier:
    """`mask (f(K) - v)`: f by name, the mask and the level t from a `Cut`, v one number per input.

    - `soft`: `f = K (|K| - t)`, SNELL's equation 5 (arXiv 2411.01800); slope `2 |K| - t`.
    - `square`: `f = K |K|`, as released; the magnitude takes no part in the gradient, so that the slope is `|K|`.
    - `hard`: `f = K`, slope 1.
    - `none`: `f = K`, and no entry is zeroed.

    The level is a constant of the gradient.
    """

    name: SparsifierName

    def apply(self, kernel: Tensor, cut: Cut | None, start: int, offset: Tensor | None) -> Tensor:
        """The change of the weight in some columns, differentiable; `start` is the number of the first entry."""
        change = kernel
        magnitude = kernel.detach().abs() if self.name == "square" else kernel.abs()
        if self.name == "soft":
            assert cut is not None
            change = kernel * (magnitude - cut.level)
        elif self.name == "square":
            change = kernel * magnitude
        if offset is not None:
            change = change - offset
        return change if cut is None else change * cut.mask(magnitude.detach(), start)

    def apply_(self, kernel: Tensor, cut: Cut | None, start: int, offset: Tensor | None) -> Tensor:
        """`apply` without a gradient, in the place of the kernel."""
        return self.work_(kernel, cut, start, offset, None)

    def pull_(self, grad: Tensor, kernel: Tensor, cut: Cut | None, start: int) -> Tensor:
        """From the gradient of the change to that of the kernel, in its place."""
        self.work_(kernel.clone(), cut, start, None, grad)
        return grad

    def work_(self, kernel: Tensor, cut: Cut | None, start: int, offset: Tensor | None, grad: Tensor | None) -> Tensor:
        """`apply_`, and `pull_` where there is a gradient: magnitudes and mask are made once for both."""
        if cut is None:
            return kernel if offset is None else kernel.sub_(offset)
        magnitude = kernel.abs()
        mask = cut.mask(magnitude, start)
        if self.name == "soft":
            magnitude.sub_(cut.level)
        if grad is not None:
            grad *= mask
            if self.name == "square":
                grad *= magnitude
        if self.name != "hard":
            kernel *= magnitude
        if grad is not None and self.name == "soft":
            grad *= magnitude.mul_(2.0).add_(cut.level)
        if offset is not None:
            kernel -= offset
        return kernel.mul_(mask)

    def start(self, column: Tensor, kept: int, out_features: int) -> Tensor:
        """What v must be for the change to be zero while every row of the kernel equals `column` (in,).

        The gate of `soft` is part of f; that of the others is the mask's business alone.
        """
        if self.name == "square":
            return column * column.abs()
        if self.name != "soft":
            return column.clone()
        zeroed = len(column) * out_features - kept
        magnitude = column.abs()
        level = torch.sort(magnitude).values[ceil(zeroed / out_features) - 1] if zeroed else magnitude.new_zeros(())
        return column * (magnitude - level).clamp_min(0.0)


def dense_cut(kernel: Tensor, kept: int) -> Cut:
    """The cut that keeps so many entries of a whole kernel (out, in)."""
    flat = kernel.detach().abs().T.reshape(-1)
    zeroed = flat.numel() - kept
    if not zeroed:
        return Cut(flat.new_zeros(()), flat.numel())
    level = torch.kthvalue(flat, zeroed).values
    equal = flat == level
    left = int(equal.sum()) - (zeroed - int((flat < level).sum()))
    return Cut(level, int(equal.nonzero()[left - 1]) + 1 if left else 0)


def streamed_cut(
    sweep: Callable[[], Iterable[Tensor]], entries: int, kept: int, like: Tensor, bracket: Bracket | None = None
) -> Cut:
    """The same cut from tiles, each seen once per pass.

    The bits of a magnitude, read as a number, are ordered as the magnitudes are. Each pass counts the entries per value
    of the next 16 bits and goes on inside of the one that holds the wanted rank, so that the last one ends at the exact
    value: two passes in float32, four in float64. On the CPU the second pass gathers what the first one has left over,
    when that is little, and ends there; and a bracket that holds makes one such pass of it all. Counts are whole
    numbers: the result depends on nothing but the values. A further pass is taken when several entries equal the level
    and some of them are kept.

    Args:
        sweep: yields the kernel from its first column to its last in tiles (out, n), the same ones at every call.
        entries: entries of all tiles together.
        kept: how many of them are to be kept.
        like: a tensor of the kernel's dtype and device.
        bracket: where the level is looked for first; learns it.
    """
    zeroed = entries - kept
    if not zeroed:
        return Cut(like.new_zeros(()), entries)
    cpu = like.device.type == "cpu"
    found = None
    if cpu and bracket is not None and (span := bracket.range()) is not None:
        found = within(sweep, zeroed, *span, entries // _FEW)
    level, left = found or _digits(sweep, zeroed, like, entries // _FEW if cpu else 0)
    if cpu and bracket is not None:
        bracket.note(float(level))
    return Cut(level, _bound(sweep, level, left) if left else 0)


def _digits(sweep: Callable[[], Iterable[Tensor]], zeroed: int, like: Tensor, few: int) -> tuple[Tensor, int]:
    """The level, and how many entries that equal it are kept; gathered as soon as no more than a few are left."""
    kind = torch.int32 if like.dtype == torch.float32 else torch.int64
    rank = torch.tensor(zeroed, device=like.device)
    prefix = torch.zeros((), dtype=kind, device=like.device)
    equal = rank
    for shift in range(8 * like.element_size() - _DIGIT, -1, -_DIGIT):
        # Bin 0 takes everything below the prefix, which is counted already, the last one everything above.
        base = prefix << _DIGIT
        counts = torch.zeros((1 << _DIGIT) + 2, dtype=torch.int64, device=like.device)
        for tile in sweep():
            digits = (tile.abs().view(kind) >> shift).sub_(base).clamp_(-1, 1 << _DIGIT).add_(1)
            _count(counts, digits)
        counts[0] = 0
        below = counts.cumsum(0)
        digit = torch.searchsorted(below, rank)
        equal = counts[digit]
        rank = rank - (below[digit] - equal)
        prefix = base + (digit - 1).to(kind)
        if shift and few and int(equal) <= few:
            low, high = prefix << shift, (prefix << shift) + ((1 << shift) - 1)
            span = float(low.view(like.dtype)), float(high.view(like.dtype))
            found = within(sweep, zeroed, *span, few)
            if found is not None:
                return found
    return prefix.view(like.dtype), int(equal - rank)


def _count(counts: Tensor, digits: Tensor) -> None:
    flat = digits.view(-1)
    if flat.is_cuda:
        # There `bincount` waits for the device.
        counts.scatter_add_(0, flat.long(), torch.ones_like(flat, dtype=torch.int64))
    else:
        counts += torch.bincount(flat, minlength=len(counts))


def _bound(sweep: Callable[[], Iterable[Tensor]], level: Tensor, left: int) -> int:
    """Number after that of the `left`-th entry whose magnitude equals the level."""
    seen = 0
    for tile in sweep():
        equal = tile.abs().eq(level).T.reshape(-1)
        here = int(equal.sum())
        if here >= left:
            return seen + int(equal.nonzero()[left - 1]) + 1
        left -= here
        seen += equal.numel()
    return seen
