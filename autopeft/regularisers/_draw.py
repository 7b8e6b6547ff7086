"""Random numbers that depend on a seed and a step alone, so that a training that goes on draws the same."""

from __future__ import annotations

import hashlib

import torch

__all__ = ["generator_at"]


def generator_at(seed: int, step: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator for one step of one regulariser; the global random state is not touched."""
    digest = hashlib.sha256(f"{seed} {step}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:4], "big"))
