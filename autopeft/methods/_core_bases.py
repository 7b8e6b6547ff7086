"""The frozen bases that core matrices lie between, by name."""

from __future__ import annotations

import hashlib
from typing import Literal

import torch
from torch import Tensor

from autopeft.core.scores import TensorEvidence
from autopeft.core.site import Site
from autopeft.errors import UsageError
from autopeft.methods._bases import LARGEST_RANK, top_singular

__all__ = ["MEASURED", "RECOMPUTED", "Basis", "chosen_bases", "drawn_bases"]

Basis = Literal["weight", "gradient", "activation", "aligned", "trajectory", "random"]
"""Where the bases come from; see `autopeft.methods.core.Core`."""

RECOMPUTED: frozenset[Basis] = frozenset({"weight", "random"})
"""Bases that whoever has the weight, or the seed, computes again: they are not stored."""

MEASURED: frozenset[Basis] = frozenset({"activation", "aligned", "trajectory"})
"""Bases that need a pass over the data, or a training, of their own: they are found in `TensorEvidence.bases`."""


def chosen_bases(basis: Basis, site: Site, known: TensorEvidence, seed: int) -> tuple[Tensor, Tensor]:
    """Orthonormal bases of the two sides of a weight, best directions first, as many as are ever kept.

    Args:
        basis: their name.
        site: whose weight.
        known: what is known about the weight (its rows, for a slice).
        seed: of `random`.

    Returns:
        `(U, V)`: float32 on the CPU, (out_features, n) and (in_features, n) with n the smallest of the two and 64; not
        to be written to.

    Raises:
        UsageError: when the scorer kept nothing to compute them from.
    """
    rank = min(site.out_features, site.in_features, LARGEST_RANK)
    if basis == "weight":
        return top_singular(known.value, None, rank)
    if basis == "random":
        return drawn_bases(site, seed)
    if basis == "gradient":
        return top_singular(known.signal, None, rank)
    found = known.bases.get(basis)
    if found is None:
        raise UsageError(f"the basis `{basis}` of {site.name} was not measured; plan with this method in the study")
    return found[0][:, :rank], found[1][:, :rank]


def drawn_bases(site: Site, seed: int) -> tuple[Tensor, Tensor]:
    """Uniformly distributed orthonormal bases, drawn from the seed and the site's name and shape alone.

    Returns:
        As `chosen_bases`.
    """
    rank = min(site.out_features, site.in_features, LARGEST_RANK)
    sides = []
    for side, length in (("left", site.out_features), ("right", site.in_features)):
        digest = hashlib.sha256(f"{seed}:{site.name}:{side}:{length}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        draw = torch.randn(length, rank, generator=generator, dtype=torch.float64)
        q, r = torch.linalg.qr(draw)
        # A positive diagonal of R makes the factorisation unique, and Q uniform.
        sides.append((q * r.diagonal().sign()).float())
    return sides[0], sides[1]
