"""The largest entries of many tensors together, without ever joining the tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from autopeft.errors import UsageError

__all__ = ["Ranking", "top_entries"]

_BINS = 1 << 15
_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}
_SHIFT = {torch.float32: 16, torch.float64: 48}
_CHUNK = 1 << 22
"""Entries looked at together: bounds the temporary memory whatever the size of a tensor."""


class _Bin(NamedTuple):
    """Distinct values of one bin: descending, equal values in the order of their tensors.

    Attributes:
        values: the values, (m,).
        tensors: number of the tensor that each value lies in, (m,).
        ends: entries up to and including each value, (m,).
    """

    values: Tensor
    tensors: Tensor
    ends: Tensor


class Ranking:
    """Entries of several tensors ranked together: by value, then by tensor order, then by flat position.

    Every cut is exact. The first 15 bits after the sign of a float that is not negative grow with its value, so that
    one histogram per tensor places any cut within a bin of under one per cent of the value; the distinct values of
    such a bin are collected when a cut first falls into it and kept. A bisection over cuts therefore reads the tensors
    once, and once more for each of the first few steps.

    Args:
        tensors: values that are finite and not negative, all float32 or all float64, of any shape, on the CPU. They
            are referred to, not copied, and must not change.

    Raises:
        UsageError: when a tensor holds a negative value, NaN or infinity, or the types differ.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        dtypes = {t.dtype for t in tensors}
        if len(dtypes) > 1 or not dtypes <= set(_BITS):
            found = ", ".join(sorted(str(d) for d in dtypes))
            raise UsageError(f"a ranking needs tensors of one type, float32 or float64, got {found}")
        self._flat = [t.detach().reshape(-1) for t in tensors]
        for i, flat in enumerate(self._flat):
            if flat.numel() and not (flat.min() >= 0 and flat.max() < torch.inf):
                raise UsageError(f"only finite values that are not negative can be ranked; tensor {i} holds others")
        hists = [_histogram(flat) for flat in self._flat]
        own = torch.stack(hists) if hists else torch.zeros((0, _BINS), dtype=torch.int64)
        # above[t, b]: entries of tensor t in bin b or higher; one more column of zeros on top.
        above = own.flip(1).cumsum(1).flip(1)
        self._above = torch.cat([above, above.new_zeros((len(hists), 1))], dim=1)
        self._total = self._above.sum(0)
        self._bins: dict[int, _Bin] = {}

    def __len__(self) -> int:
        """Entries of all tensors together."""
        return sum(flat.numel() for flat in self._flat)

    def counts(self, tau: int) -> list[int]:
        """How many of the `tau` largest entries lie in each tensor; sums to `tau`.

        Raises:
            UsageError: when `tau` is negative or larger than the number of entries.
        """
        found: list[int] = self._counts(tau).tolist()
        return found

    def indices(self, tau: int) -> list[Tensor]:
        """Flat positions of the `tau` largest entries: per tensor an increasing int64 tensor.

        Raises:
            UsageError: when `tau` is negative or larger than the number of entries.
        """
        return [_largest(flat, n) for flat, n in zip(self._flat, self.counts(tau), strict=True)]

    def indices_of(self, tensor: int, tau: int) -> Tensor:
        """What `indices(tau)` gives for one tensor, without the work for the others."""
        return _largest(self._flat[tensor], self.counts(tau)[tensor])

    def _counts(self, tau: int) -> Tensor:
        if not 0 <= tau <= len(self):
            raise UsageError(f"the number of entries to select must be between 0 and {len(self):,}, got {tau:,}")
        # _total falls from the number of entries (bin 0) to 0: the last bin from which at least tau entries follow.
        bin_ = int(torch.searchsorted(-self._total, torch.tensor(-tau), right=True)) - 1
        rest = tau - (int(self._total[bin_ + 1]) if bin_ < _BINS else 0)
        if bin_ == _BINS or rest == int(self._total[bin_] - self._total[bin_ + 1]):
            return self._above[:, bin_]
        found = self._above[:, bin_ + 1].clone()
        if rest:
            values = self._bin(bin_)
            whole = int(torch.searchsorted(values.ends, torch.tensor(rest), right=True))
            taken = torch.diff(values.ends[:whole], prepend=values.ends.new_zeros(1))
            found.scatter_add_(0, values.tensors[:whole], taken)
            begun = int(values.ends[whole - 1]) if whole else 0
            found[values.tensors[whole]] += rest - begun
        return found

    def _bin(self, bin_: int) -> _Bin:
        if bin_ not in self._bins:
            values, counts, tensors = [], [], []
            for i, flat in enumerate(self._flat):
                if self._above[i, bin_] == self._above[i, bin_ + 1]:
                    continue
                distinct, count = torch.unique(_members(flat, bin_), return_counts=True)
                values.append(distinct)
                counts.append(count)
                tensors.append(torch.full_like(count, i))
            joined = torch.cat(values)
            order = torch.sort(joined, descending=True, stable=True).indices
            self._bins[bin_] = _Bin(joined[order], torch.cat(tensors)[order], torch.cat(counts)[order].cumsum(0))
        return self._bins[bin_]


def top_entries(tensors: Sequence[Tensor], tau: int) -> list[Tensor]:
    """Flat positions of the `tau` largest entries of several tensors together.

    Args:
        tensors: values that are finite and not negative, all float32 or all float64, of any shape, on the CPU.
        tau: how many.

    Returns:
        Per tensor an increasing int64 tensor. Ties go to the earlier tensor, then to the lower position.

    Raises:
        UsageError: as `Ranking` does.
    """
    return Ranking(tensors).indices(tau)


def _keys(flat: Tensor) -> Tensor:
    """Bin of each entry: exponent and leading bits of the fraction. The sign bit of a negative zero is dropped."""
    bits = flat.view(_BITS[flat.dtype])
    return (bits >> _SHIFT[flat.dtype]) & (_BINS - 1)


def _histogram(flat: Tensor) -> Tensor:
    found = torch.zeros(_BINS, dtype=torch.int64)
    for part in torch.split(flat, _CHUNK):
        found += torch.bincount(_keys(part), minlength=_BINS)
    return found


def _members(flat: Tensor, bin_: int) -> Tensor:
    return torch.cat([part[_keys(part) == bin_] for part in torch.split(flat, _CHUNK)])


def _largest(flat: Tensor, n: int) -> Tensor:
    """Positions of the `n` largest entries, increasing; ties go to the lower position."""
    if n == 0:
        return torch.empty(0, dtype=torch.int64)
    if n == flat.numel():
        return torch.arange(n)
    cut = torch.topk(flat, n, sorted=False).values.min()
    larger = (flat > cut).nonzero().squeeze(1)
    equal = (flat == cut).nonzero().squeeze(1)[: n - larger.numel()]
    return torch.cat([larger, equal]).sort().values
