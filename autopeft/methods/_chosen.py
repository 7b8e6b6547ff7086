"""Choosing the best-scored or the smallest entries of a tensor, with an exact count and ties broken by position."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["best_entries", "smallest_entries"]


def best_entries(score: Tensor, n: int) -> Tensor:
    """Flat positions of the `n` entries of largest magnitude, strictly increasing, int64; the first among equals."""
    return _first(score.detach().to("cpu").flatten().abs(), n)


def smallest_entries(value: Tensor, n: int) -> Tensor:
    """Flat positions of the `n` entries of smallest magnitude, strictly increasing, int64; the first among equals."""
    return _first(-value.detach().to("cpu").flatten().abs(), n)


def _first(rank: Tensor, n: int) -> Tensor:
    """Positions of the `n` largest numbers."""
    if n >= rank.numel():
        return torch.arange(rank.numel())
    cut = torch.topk(rank, n, sorted=True).values[-1]
    above = torch.nonzero(rank > cut).flatten()
    level = torch.nonzero(rank == cut).flatten()[: n - len(above)]
    return torch.cat((above, level)).sort().values
