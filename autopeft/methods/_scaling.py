"""The fixed factor in front of a pair of low-rank factors."""

from __future__ import annotations

import math
from typing import Literal, get_args

from autopeft.errors import UsageError

__all__ = ["Scaling", "lora_scale"]

Scaling = Literal["rank", "sqrt"]
"""What alpha is divided by: the rank, or its square root."""


def lora_scale(method: str, alpha: float | None, scaling: Scaling, rank: int) -> float:
    """The fixed factor in front of `B A`.

    `rank`: `alpha / r` (Hu et al., 2021, arXiv 2106.09685, section 4.1), 1 where alpha is None. `sqrt`:
    `alpha / sqrt(r)` (rsLoRA; Kalajdzievski, 2023, arXiv 2312.03732, theorem 3.2), `1 / sqrt(r)` where alpha is None,
    so that the two agree at rank 1.

    Raises:
        UsageError: for an alpha that is no positive number, or an unknown scaling.
    """
    if alpha is not None and not (math.isfinite(alpha) and alpha > 0):
        raise UsageError(f"{method}: alpha must be a positive number or null, got {alpha!r}")
    if scaling not in get_args(Scaling):
        raise UsageError(f"{method}: scaling must be one of {', '.join(get_args(Scaling))}, got {scaling!r}")
    if scaling == "sqrt":
        return (1.0 if alpha is None else alpha) / math.sqrt(rank)
    return 1.0 if alpha is None else alpha / rank
