"""Which sizes a method offers, and the check of one that is asked for."""

from __future__ import annotations

from collections.abc import Sequence

from autopeft.core.site import Site
from autopeft.errors import UsageError

__all__ = ["check_size", "half_octaves", "powers_of_two"]


def powers_of_two(largest: int) -> tuple[int, ...]:
    """1, 2, 4, ... up to `largest`; empty when `largest` is below 1."""
    return tuple(1 << i for i in range(max(largest, 0).bit_length()))


def half_octaves(largest: int) -> tuple[int, ...]:
    """1, 2, 3, 4, 6, 8, 12, 16, ... below `largest`, and `largest` itself; empty when `largest` is below 1."""
    if largest < 1:
        return ()
    between = (3 << i for i in range(largest.bit_length()))
    return tuple(sorted({n for n in (*powers_of_two(largest), *between) if n < largest} | {largest}))


def check_size(method: str, site: Site, size: int, sizes: Sequence[int]) -> int:
    """The size, when it lies between 1 and the largest that is offered.

    Raises:
        UsageError: when it does not, or when the method cannot be used on the site at all.
    """
    if not sizes:
        raise UsageError(f"{method} cannot be used on {site.name} ({site.kind} of shape {site.shape})")
    if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= sizes[-1]:
        raise UsageError(
            f"{method} on {site.name} takes a whole size from 1 to {sizes[-1]}, got {size!r}; "
            f"the sizes worth offering are {', '.join(map(str, sizes))}"
        )
    return size
