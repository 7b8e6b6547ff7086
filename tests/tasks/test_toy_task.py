from __future__ import annotations

import pytest
import torch
from torch import nn

from autopeft.errors import StoreError, UsageError
from autopeft.testing.toy_task import ToyTask


def test_shapes_and_sizes() -> None:
    task = ToyTask(12, 6, 3, classes=3, size=5, channels=1, batch_size=5)
    assert task.sizes == {"inner": 12, "outer": 6, "test": 3}
    assert task.classes == ("class0", "class1", "class2")
    assert [tuple(x.shape) for x, _ in task.batches("inner", 0)] == [(5, 1, 5, 5), (5, 1, 5, 5), (2, 1, 5, 5)]


def test_a_linear_model_learns_it() -> None:
    task = ToyTask()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    assert task.evaluate(model, "outer")["top1"] < 0.7
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for epoch in range(5):
        for batch in task.batches("inner", epoch):
            optimizer.zero_grad()
            task.loss(model, batch).backward()
            optimizer.step()
    assert task.evaluate(model, "outer")["top1"] == 1.0


def test_the_hash_follows_the_data() -> None:
    assert ToyTask().data_hash == ToyTask(batch_size=3).data_hash
    assert len({ToyTask().data_hash, ToyTask(seed=1).data_hash, ToyTask(noise=0.1).data_hash}) == 3


def test_wrong_uses_are_refused() -> None:
    with pytest.raises(UsageError, match="each of the 4 classes, got 3"):
        ToyTask(n_test=3)
    with pytest.raises(StoreError, match="sealed"):
        ToyTask().batches("test")
