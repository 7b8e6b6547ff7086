"""Where the patches lie in a sequence of tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from autopeft.core.site import Site
from autopeft.errors import UsageError

__all__ = ["Grid", "check_prefix", "extra_tokens", "on_patches", "patch_grid"]

_MOST_PREFIX = 8
"""More tokens than this in front of the patches are not guessed: models have class, distillation and register tokens,
five at most in timm's, and a rectangular grid would be mistaken for a square one with a long prefix."""

_EXTRA: ContextVar[int] = ContextVar("autopeft_extra_tokens", default=0)


@contextmanager
def extra_tokens(count: int) -> Iterator[None]:
    """While a block runs on `count` tokens more than its own, which lie behind them."""
    token = _EXTRA.set(_EXTRA.get() + count)
    try:
        yield
    finally:
        _EXTRA.reset(token)


class Grid(NamedTuple):
    """A square of `side * side` patches behind `prefix` tokens, with `suffix` tokens behind it."""

    prefix: int
    side: int
    suffix: int


def check_prefix(method: str, prefix: int | None) -> None:
    """Refuse a number of prefix tokens that is none.

    Raises:
        UsageError: for a number below 0.
    """
    if prefix is not None and prefix < 0:
        raise UsageError(f"{method}: prefix must be at least 0, or null to infer it, got {prefix!r}")


def patch_grid(site: Site, count: int, prefix: int | None) -> Grid:
    """The grid in a sequence of `count` tokens.

    Args:
        site: where, for messages.
        count: tokens of the sequence, those that `extra_tokens` tells of included.
        prefix: tokens in front of the patches; None infers the fewest that leave a square.

    Raises:
        UsageError: when the patches form no square, or so many tokens would lie in front of them that they probably
            form none.
    """
    suffix = _EXTRA.get()
    own = count - suffix
    if prefix is None:
        side = math.isqrt(max(own, 0))
        found = own - side * side
        if side < 1 or found > _MOST_PREFIX:
            raise UsageError(
                f"{site.name} is given {own} tokens: a square of {side} x {side} patches would leave {found} tokens in "
                f"front of it. Set the method's `prefix` to their number; grids that are not square have no patches' "
                f"neighbours that could be known here"
            )
        return Grid(found, side, suffix)
    side = math.isqrt(max(own - prefix, 0))
    if side < 1 or side * side != own - prefix:
        raise UsageError(
            f"{site.name} is given {own} tokens, {prefix} of them in front of the patches; the other {own - prefix} "
            f"form no square grid, and only square grids are supported. Give square images, or correct `prefix`"
        )
    return Grid(prefix, side, suffix)


def on_patches(
    site: Site,
    x: Tensor,
    prefix: int | None,
    maps: Callable[[Tensor], Tensor],
    others: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Apply a function to the map of patches in a tensor.

    Args:
        site: where, for messages.
        x: tokens (B, N, C), or a map (B, H, W, C) of patches alone.
        prefix: as for `patch_grid`; maps have none.
        maps: function of (B, s, s, C) that keeps batch and grid.
        others: function of the other tokens, (B, M, C) to (B, M, C'); None makes them zero.

    Returns:
        As `x`, with the channels that `maps` gives.

    Raises:
        UsageError: for another number of dimensions, or a grid that is not square.
    """
    if x.ndim == 4:
        if x.shape[1] != x.shape[2]:
            raise UsageError(
                f"{site.name} is given a map of {x.shape[1]} x {x.shape[2]}; only square grids are supported, since "
                f"(windows, patches) cannot be told from (height, width) otherwise"
            )
        return maps(x)
    if x.ndim != 3:
        raise UsageError(
            f"{site.name} is given a tensor of shape {tuple(x.shape)}; a grid of patches needs tokens (batch, tokens, "
            f"channels) or a map (batch, height, width, channels)"
        )
    grid = patch_grid(site, x.shape[1], prefix)
    stop = grid.prefix + grid.side**2
    patches = x[:, grid.prefix : stop].reshape(len(x), grid.side, grid.side, x.shape[2])
    changed = maps(patches).flatten(1, 2)
    if others is None:
        return F.pad(changed, (0, 0, grid.prefix, grid.suffix))
    if not grid.prefix and not grid.suffix:
        return changed
    rest = others(torch.cat((x[:, : grid.prefix], x[:, stop:]), 1))
    return torch.cat((rest[:, : grid.prefix], changed, rest[:, grid.prefix :]), 1)
