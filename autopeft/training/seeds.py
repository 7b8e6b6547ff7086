"""Seeds derived from one seed, and random state that is put back.

The outer loop derives seeds without loading torch, so it is imported where it is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
from collections.abc import Iterator

__all__ = ["derive_seed", "isolated_rng", "seed_all"]


def derive_seed(seed: int, *parts: str | int) -> int:
    """A seed in [0, 2^32) for one purpose: the first four bytes of the SHA-256 of `[seed, *parts]`.

    Unlike `seed + k`, two purposes never share a stream, and adding a purpose changes no other. Every generator in use
    (torch, numpy's `RandomState`, Python's) takes 32 bits.

    Args:
        seed: the run's or the trial's seed.
        parts: what the seed is for, such as `("order", epoch)`.
    """
    text = json.dumps([int(seed), *parts])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")


@contextlib.contextmanager
def isolated_rng(seed: int) -> Iterator[None]:
    """Seed the global generators of torch (CPU and every CUDA device), numpy and Python; put their state back at exit.

    Args:
        seed: a seed in [0, 2^32).
    """
    import numpy as np
    import torch

    python, numpy = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices):
            seed_all(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def seed_all(seed: int) -> None:
    """Seed the global generators, inside of `isolated_rng`."""
    import numpy as np
    import torch

    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
