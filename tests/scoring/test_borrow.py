from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from autopeft.scoring.borrow import borrowed
from autopeft.testing.tiny import tiny_convnet


def test_inside_and_after() -> None:
    model = tiny_convnet().train()
    model.norm.eval()
    parameters = list(model.parameters())
    parameters[0].requires_grad_(False)
    kept = parameters[1].grad = torch.ones_like(parameters[1])
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()

    def use() -> None:
        with borrowed(model, [parameters[0]]):
            assert not any(m.training for m in model.modules())
            assert [p.requires_grad for p in parameters] == [True] + [False] * (len(parameters) - 1)
            assert all(p.grad is None for p in parameters)
            parameters[0].grad = torch.ones_like(parameters[0])
            torch.rand(2), np.random.rand(2), random.random()
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        use()
    assert model.training
    assert not model.norm.training
    assert [p.requires_grad for p in parameters] == [False] + [True] * (len(parameters) - 1)
    assert parameters[0].grad is None
    assert parameters[1].grad is kept
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert random.getstate() == states[2]


def test_flags_can_be_left_alone() -> None:
    model = tiny_convnet().requires_grad_(False)
    with borrowed(model):
        assert not any(p.requires_grad for p in model.parameters())
