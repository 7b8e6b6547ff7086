from __future__ import annotations

import hashlib
import random

import numpy as np
import pytest
import torch

from autopeft.training.seeds import derive_seed, isolated_rng


def test_derived_seed_is_the_first_four_bytes_of_the_digest() -> None:
    digest = hashlib.sha256(b'[7, "order", 3]').digest()
    assert derive_seed(7, "order", 3) == int.from_bytes(digest[:4], "little")


def test_purposes_never_share_a_seed() -> None:
    seeds = [derive_seed(s, p, e) for s in range(5) for p in ("order", "noise") for e in range(20)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= s < 2**32 for s in seeds)
    assert derive_seed(1, "23") != derive_seed(12, "3")
    assert derive_seed(1, 2) != derive_seed(1, "2")


def _draw() -> tuple[float, float, float]:
    return torch.rand(1).item(), float(np.random.rand()), random.random()


def _fail() -> None:
    _draw()
    raise ZeroDivisionError


def test_random_state_is_put_back_also_after_an_error() -> None:
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    expected = _draw()
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    with pytest.raises(ZeroDivisionError), isolated_rng(5):
        _fail()
    assert _draw() == expected
    with isolated_rng(5):
        inside = _draw()
    with isolated_rng(5):
        assert _draw() == inside
    assert inside != expected
