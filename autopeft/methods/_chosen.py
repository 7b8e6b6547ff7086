"""Choosing the best-scored entries of a tensor, with an exact count and ties broken by position."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["best_entries"]


def best_entries(score: Tensor, n: int) -> Tensor:
    """Flat positions of the `n` entries of largest magnitude, strictly increasing, int64; the first among equals."""
    flat = score.detach().to("cpu").flatten().abs()
    if n >= flat.numel():
        return torch.arange(flat.numel())
    cut = torch.topk(flat, n, sorted=True).values[-1]
    above = torch.nonzero(flat > cut).flatten()
    level = torch.nonzero(flat == cut).flatten()[: n - len(above)]
    return torch.cat((above, level)).sort().values
