"""Which sizes of PEFT's adapter types are worth trying on a site, and what a size sets in their configuration."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from autopeft.core.site import Site

__all__ = [
    "adalora",
    "bank",
    "bases",
    "block_sizes",
    "blocks",
    "c3a_block",
    "doubling",
    "entries",
    "even_ranks",
    "half_ranks",
    "initial_ranks",
    "named",
    "nothing",
    "one",
    "pairs",
    "ranks",
    "road",
    "sparse_rate",
    "sparsity",
    "trained_rank",
    "vector_length",
    "wide_ranks",
]


def doubling(first: int, last: int) -> tuple[int, ...]:
    """`first`, twice that, ..., as far as `last`."""
    found = []
    while first <= last:
        found.append(first)
        first *= 2
    return tuple(found)


def ranks(site: Site) -> tuple[int, ...]:
    """Powers of two up to the smaller dimension."""
    return doubling(1, min(site.in_features, site.out_features))


def even_ranks(site: Site) -> tuple[int, ...]:
    """Powers of two from 2, for types that start from pairs."""
    return doubling(2, min(site.in_features, site.out_features))


def initial_ranks(site: Site) -> tuple[int, ...]:
    """AdaLoRA's ranks before it cuts."""
    return tuple(r for r in (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64) if r <= min(site.in_features, site.out_features))


def half_ranks(site: Site) -> tuple[int, ...]:
    """Powers of two up to half of the smaller dimension."""
    return doubling(1, min(site.in_features, site.out_features) // 2)


def wide_ranks(site: Site) -> tuple[int, ...]:
    """Ranks of methods that pay for them one scalar at a time."""
    return (1, 4, 16, 64, 256, 1024)


def entries(site: Site) -> tuple[int, ...]:
    """Powers of two below the number of entries."""
    return doubling(1, site.n_weight - 1)


def pairs(site: Site) -> tuple[int, ...]:
    """Powers of two among the entries off the diagonal of the inputs' square."""
    return doubling(1, min(site.n_weight - 1, site.in_features * (site.in_features - 1)))


def one(site: Site) -> tuple[int, ...]:
    """No size to choose."""
    return (1,)


def block_sizes(site: Site) -> tuple[int, ...]:
    """Even block sizes that divide the inputs."""
    return tuple(b for b in doubling(2, site.in_features) if site.in_features % b == 0)


def blocks(site: Site) -> tuple[int, ...]:
    """Into how many circulant blocks the common divisor of inputs and outputs can be cut."""
    common = math.gcd(site.in_features, site.out_features)
    return tuple(n for n in doubling(1, common) if common % n == 0)


def named(*names: str) -> Callable[[Site, int], Mapping[str, Any]]:
    """Settings that are the size itself under these names."""
    return lambda site, size: dict.fromkeys(names, size)


def nothing(site: Site, size: int) -> Mapping[str, Any]:
    """A size that sets nothing."""
    return {}


def bases(site: Site, size: int) -> Mapping[str, Any]:
    """RandLoRA trains more with a lower rank; its size is the number of bases that cover the smaller dimension."""
    rank = -(-min(site.in_features, site.out_features) // size)
    return {"r": rank, "randlora_alpha": 20 * rank}


def sparse_rate(site: Site, size: int) -> Mapping[str, Any]:
    """FRoD's share of sparse entries, figured so that it rounds down to the size."""
    return {"sparse_rate": (size + 0.5) / site.in_features**2}


def sparsity(site: Site, size: int) -> Mapping[str, Any]:
    """The share of entries that stay, figured so that the rest rounds down to the size."""
    return {"sparsity": 1.0 - (size + 0.5) / site.n_weight}


def c3a_block(site: Site, size: int) -> Mapping[str, Any]:
    """The side of a circulant block."""
    return {"block_size": math.gcd(site.in_features, site.out_features) // size}


def road(site: Site, size: int) -> Mapping[str, Any]:
    """The variant, and the largest group up to 64 that divides the outputs."""
    group = max((g for g in doubling(2, 64) if site.out_features % g == 0), default=2)
    return {"variant": f"road_{size}", "group_size": group}


def trained_rank(site: Site, size: int) -> Mapping[str, Any]:
    """OSF freezes the leading directions; its size is how many are left to train."""
    return {"effective_rank": min(site.in_features, site.out_features) - size}


def adalora(site: Site, size: int) -> Mapping[str, Any]:
    """Initial rank, and two thirds of it as the target."""
    # PEFT's own defaults start at rank 12 for an average of 8. The total is set when training begins.
    return {"init_r": size, "target_r": max(1, 2 * size // 3), "total_step": 1 << 30}


def vector_length(site: Site) -> int:
    """The largest length that divides both sides of all of a group's members."""
    sides = [side for member in site.members for side in (member.in_features, member.out_features)]
    return math.gcd(*sides)


def bank(site: Site, size: int) -> Mapping[str, Any]:
    """The rank, and the longest vector up to 256 that all sides can be cut into."""
    length = vector_length(site)
    fitting = max((b for b in doubling(1, 256) if length % b == 0), default=1)
    return {"r": size, "vector_length": fitting}
