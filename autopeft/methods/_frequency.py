"""Low frequencies of maps, without complex numbers."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["low_pass"]


def low_pass(maps: Tensor, reach: int) -> Tensor:
    """What remains of maps when all frequencies beyond `reach` are taken out.

    The two-dimensional discrete Fourier transform is restricted to the frequencies (f, g) with `|f| <= reach` and
    `|g| <= reach`, and inverted. That is a product with one real symmetric projection per axis, of entries
    `1 / n sum over |f| <= reach of cos(2 pi f (i - j) / n)`, which every precision, device and export format has.

    Args:
        maps: (B, H, W, C).
        reach: largest frequency that is kept, at least 0; 0 keeps the mean alone.

    Returns:
        A tensor of the shape and dtype of `maps`.
    """
    wide = maps if maps.dtype == torch.float64 else maps.float()
    height, width = (_projection(maps.shape[axis], reach, wide) for axis in (1, 2))
    kept = torch.einsum("ih,bhwc->biwc", height, torch.einsum("jw,bhwc->bhjc", width, wide))
    return kept.to(maps.dtype)


def _projection(n: int, reach: int, like: Tensor) -> Tensor:
    """The projection of length n; the identity where every frequency is kept."""
    if 2 * reach + 1 >= n:
        return torch.eye(n, dtype=like.dtype, device=like.device)
    places = torch.arange(n, device=like.device)
    frequencies = torch.arange(-reach, reach + 1, device=like.device)
    # Whole turns are taken out in integers, where nothing is rounded.
    turns = (frequencies[:, None, None] * (places[:, None] - places)) % n
    return (turns.to(like.dtype) * (2 * torch.pi / n)).cos().sum(0) / n
