from __future__ import annotations

import math

import torch

from autopeft.models.scan import scan
from autopeft.scoring.random import Random
from autopeft.testing.tiny import tiny_vit
from autopeft.testing.toy_task import ToyTask


def test_unit_gaussian_noise() -> None:
    model = tiny_vit()
    catalog = scan(model)
    scores = Random().score(model, catalog, ToyTask())
    slots = [e[slot] for e in scores.evidence.values() if not e.site.parent for slot in e.slots]
    noise = torch.cat([t.signal.flatten() for t in slots])
    n = len(noise)
    assert n > 7000
    assert abs(noise.mean()) < 4 / math.sqrt(n)
    assert abs(noise.var() - 1) < 4 * math.sqrt(2 / n)
    assert all(torch.equal(t.score, t.signal.square()) for t in slots)
    shapes = [t for t in slots if t.signal.shape == (16, 64)]
    assert not torch.equal(shapes[0].signal, shapes[1].signal)


def test_seeds() -> None:
    model = tiny_vit()
    catalog, task = scan(model), ToyTask()

    def draw(own: int, given: int) -> torch.Tensor:
        return Random(own).score(model, catalog, task, given).evidence["blocks.0"]["output"].signal

    assert torch.equal(draw(0, 3), draw(3, 0))
    assert not torch.equal(draw(0, 3), draw(0, 4))
