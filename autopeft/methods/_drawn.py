"""Random numbers that belong to a method's seed and a site, whatever seed a plan is inserted with."""

from __future__ import annotations

import hashlib

import torch

__all__ = ["own_generator"]


def own_generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator for what must come out the same again when a plan is loaded, and is not stored.

    Args:
        seed: the method's own seed.
        name: the site's name.
    """
    digest = hashlib.sha256(f"{int(seed)}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
