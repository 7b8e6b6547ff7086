"""Trained tokens put behind a block's own."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from autopeft.core.scores import Evidence
from autopeft.core.site import Site
from autopeft.errors import UsageError
from autopeft.methods._spectrum import energy

__all__ = ["OBSTACLE", "SIZES", "drawn_prompts", "prompt_gains", "tokens_of", "with_prompts", "without_prompts"]

OBSTACLE = "prompts are further tokens, which no tensor of the model can hold"
"""Why prompts cannot be merged."""

SIZES = (1, 2, 5, 10, 20, 50, 100, 200)
"""Numbers of prompts worth offering: those that the paper tries."""


def drawn_prompts(count: int, channels: int, generator: torch.Generator) -> Tensor:
    """Prompts (count, channels), uniform in +-sqrt(6 / (2 C)).

    The paper's Xavier bound is that of a projection of patches, `sqrt(6 / (3 * patch area + C))`; a block does not know
    the patch size, and for ViT-B/16, whose patches have as many values as it has channels, the two are equal.
    """
    bound = math.sqrt(3 / channels)
    return torch.empty(count, channels).uniform_(-bound, bound, generator=generator)


def tokens_of(site: Site, args: tuple[Any, ...]) -> Tensor:
    """The tokens (B, N, C) that a block is given.

    Raises:
        UsageError: when they are not its first positional argument.
    """
    x = args[0] if args else None
    if not isinstance(x, Tensor) or x.ndim != 3 or x.shape[-1] != site.out_features:
        given = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise UsageError(
            f"prompts cannot be put into {site.name}: its first positional argument is no (batch, tokens, "
            f"{site.out_features}) tensor but {given}"
        )
    return x


def with_prompts(x: Tensor, prompts: Tensor, dropout: float, training: bool) -> Tensor:
    """The tokens with the prompts behind them; attention does not see where a token lies."""
    shown = F.dropout(prompts.to(x.dtype).expand(len(x), -1, -1), dropout, training)
    return torch.cat((x, shown), 1)


def without_prompts(site: Site, y: Any, before: int, count: int) -> Tensor:
    """A block's output without the prompts.

    Args:
        site: the block.
        y: what it returned.
        before: tokens it was given, prompts included.
        count: prompts.

    Raises:
        UsageError: when it did not return as many tokens as it was given.
    """
    if not isinstance(y, Tensor) or y.ndim != 3 or y.shape[1] != before:
        given = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise UsageError(
            f"prompts cannot be taken out of the output of {site.name}: it was given {before} tokens, {count} of them "
            f"prompts, and returned {given}"
        )
    return y[:, : before - count]


def prompt_gains(site: Site, evidence: Evidence | None, sizes: tuple[int, ...]) -> tuple[float, ...]:
    """A proxy: the share `min(p / C, 1)` of the energy of the block's `sum over tokens of dL/dy y^T`.

    Through attention p prompts add combinations of p vectors to the tokens, a change that no evidence at the block's
    output describes. A block of p C numbers, blind to the data, is expected to hold p C / C^2 of the energy of a C x C
    matrix. Without such evidence the gain is 0.
    """
    known = None if evidence is None else evidence.get("output")
    if known is None:
        return (0.0,) * len(sizes)
    whole = energy(known.signal)
    return tuple(min(size / site.out_features, 1.0) * whole for size in sizes)
