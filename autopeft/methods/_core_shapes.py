"""The shapes of a core matrix: which entries of the grid between two bases are trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from autopeft.core.menu import Indices
from autopeft.core.site import Site
from autopeft.errors import UsageError
from autopeft.methods._bases import LARGEST_RANK
from autopeft.methods._sizes import half_octaves

__all__ = [
    "Extent",
    "Shape",
    "best_rectangle",
    "grid_side",
    "rectangle_of",
    "rectangles",
    "shape_energies",
    "shape_sizes",
]

Shape = Literal["square", "rectangle", "diagonal", "blocks"]
"""What of the grid is trained; see `autopeft.methods.core.Core`."""

_SQUARES = (*range(1, 17), 18, 20, 24, 28, 32, 40, 48, 56, LARGEST_RANK)
"""Fine where a 0.1 % budget spreads over every matrix, coarse where a few matrices get it all."""

_RECTANGLES = tuple(sorted({1, 2, 4, 6} | {m << i for m in (8, 12, 18) for i in range(10)} | {LARGEST_RANK**2}))
"""Numbers with many factors, a factor of about 1.33 to 1.5 apart."""


class Extent(NamedTuple):
    """Left and right directions that a core lies between, and the side of its square blocks (0 for one whole)."""

    rows: int
    columns: int
    block: int = 0


def grid_side(site: Site) -> int:
    """Directions kept on each side: the smaller side of the weight, at most 64."""
    return min(site.out_features, site.in_features, LARGEST_RANK)


def rectangles(size: int, side: int) -> list[tuple[int, int]]:
    """Every `(a, b)` with `a * b == size` that fits a grid of this side, by increasing a."""
    return [(a, size // a) for a in range(1, side + 1) if size % a == 0 and size // a <= side]


def shape_sizes(shape: Shape, block: int, side: int) -> tuple[int, ...]:
    """The sizes worth offering on a grid of this side, increasing; empty where not even one block fits.

    The rectangles of each size hold those of the size before, so that what they capture never falls.
    """
    if shape == "square":
        return tuple(r for r in _SQUARES if r <= side)
    if shape == "diagonal":
        return half_octaves(side)
    if shape == "blocks":
        return half_octaves(side // block)
    found = [1]
    for size in _RECTANGLES[1:]:
        larger = rectangles(size, side)
        if larger and all(any(a <= c and b <= d for c, d in larger) for a, b in rectangles(found[-1], side)):
            found.append(size)
    return tuple(found)


def shape_energies(shape: Shape, block: int, squares: Tensor, sizes: Sequence[int]) -> tuple[float, ...]:
    """Sum of the squares over the entries that each size trains; of the best rectangle of each size.

    Args:
        shape: the shape.
        block: side of a block, of shape `blocks`.
        squares: (n, n) float64, per entry of the grid.
        sizes: the sizes.
    """
    sums = squares.cumsum(0).cumsum(1)
    if shape == "square":
        return tuple(float(sums[size - 1, size - 1]) for size in sizes)
    if shape == "rectangle":
        return tuple(max(float(sums[a - 1, b - 1]) for a, b in rectangles(size, len(squares))) for size in sizes)
    side = 1 if shape == "diagonal" else block
    whole = len(squares) // side
    cells = squares[: whole * side, : whole * side].reshape(whole, side, whole, side)
    own = torch.einsum("iaib->i", cells).cumsum(0)
    return tuple(float(own[size - 1]) for size in sizes)


def best_rectangle(squares: Tensor, size: int) -> Indices:
    """The entries of the rectangle of this size whose squares sum to the most, as flat positions in the grid.

    Of equal ones the most nearly square one, then the one with fewer rows.
    """
    sums = squares.cumsum(0).cumsum(1)
    a, b = max(
        rectangles(size, len(squares)), key=lambda ab: (float(sums[ab[0] - 1, ab[1] - 1]), -abs(ab[0] - ab[1]), -ab[0])
    )
    rows, columns = torch.arange(a)[:, None], torch.arange(b)[None]
    return Indices((rows * len(squares) + columns).flatten().numpy())


def rectangle_of(site: Site, size: int, indices: Indices | None, side: int) -> tuple[int, int]:
    """Rows and columns of the rectangle that was chosen; of the most nearly square one when none was.

    Raises:
        UsageError: when the entries form no rectangle at the grid's corner.
    """
    if indices is None:
        return min(rectangles(size, side), key=lambda ab: (abs(ab[0] - ab[1]), ab[0]))
    last = int(indices.values[-1])
    a, b = last // side + 1, last % side + 1
    if a * b != size or bool((indices.values != [i * side + j for i in range(a) for j in range(b)]).any()):
        raise UsageError(
            f"the {size} entries chosen for the core of {site.name} form no rectangle at the corner of its grid of "
            f"{side} by {side}; the plan was edited or belongs to another model"
        )
    return a, b
