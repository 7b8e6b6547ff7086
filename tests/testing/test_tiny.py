from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from autopeft.testing.tiny import tiny_convnet, tiny_vit


@pytest.mark.parametrize("build", [tiny_vit, tiny_convnet])
def test_seeded_small_and_in_evaluation_mode(build: Callable[..., nn.Module]) -> None:
    state = torch.random.get_rng_state()
    model = build(num_classes=6, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not model.training
    assert sum(p.numel() for p in model.parameters()) < 10_000
    images = torch.randn(2, 3, 8, 8)
    assert model(images).shape == (2, 6)
    assert torch.equal(model(images), build(num_classes=6, seed=1)(images))
    assert not torch.equal(model(images), build(num_classes=6, seed=2)(images))
    trivial = [k for k, v in model.state_dict().items() if v.is_floating_point() and len(v.unique()) == 1]
    assert trivial == [], "no tensor is a constant that hides a missing factor or shift"


def test_width_and_groups() -> None:
    model = tiny_convnet(width=8, groups=8)
    assert model.blocks[0].conv1.weight.shape == (8, 1, 3, 3)
