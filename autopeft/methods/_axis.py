"""Laying a vector along the channel axis of an output."""

from __future__ import annotations

from torch import Tensor

__all__ = ["along"]


def along(vector: Tensor, ndim: int, axis: int) -> Tensor:
    """The vector with `ndim` axes, all of length 1 but `axis`, so that it broadcasts over an output."""
    shape = [1] * ndim
    shape[axis] = -1
    return vector.view(shape)
