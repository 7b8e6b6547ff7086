from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autopeft.core.site import Catalog, Site


class PlainTask:
    """Given images and labels in file order, in whatever type; shuffled by a seed. The loss may be replaced."""

    def __init__(
        self, images: Tensor, labels: Tensor, criterion: Callable[[Tensor, Tensor], Tensor] | None = None
    ) -> None:
        self.images, self.labels = images, labels
        self.criterion = criterion or (lambda out, y: F.cross_entropy(out, y, reduction="none"))
        self.classes = tuple("abcd")
        self.data_hash = "plain"
        self.calls = 0

    @property
    def sizes(self) -> Mapping[str, int]:
        return {"inner": len(self.images), "outer": 0, "test": 0}

    def batches(self, split: str, seed: int | None = None, batch_size: int | None = None) -> Iterator[Any]:
        assert split == "inner"
        order = torch.arange(len(self.images))
        if seed is not None:
            order = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(seed))
        for rows in order.split(batch_size or 8):
            yield self.images[rows], self.labels[rows]

    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        self.calls += 1
        return self.criterion(model(batch[0]), batch[1])

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return self.losses(model, batch).mean()


@pytest.fixture(scope="session")
def plain_task() -> type[PlainTask]:
    return PlainTask


@pytest.fixture
def noise_task() -> Callable[..., PlainTask]:
    """`n` random images with random labels, in float64."""

    def make(n: int = 12, seed: int = 0, shape: tuple[int, ...] = (3, 8, 8), classes: int = 4) -> PlainTask:
        generator = torch.Generator().manual_seed(seed)
        images = torch.randn(n, *shape, generator=generator, dtype=torch.float64)
        return PlainTask(images, torch.randint(classes, (n,), generator=generator))

    return make


@pytest.fixture
def gradients_of() -> Callable[..., dict[str, Tensor]]:
    """Plain autograd: the gradient of a task's mean loss over a batch, by parameter name."""

    def compute(model: nn.Module, task: PlainTask, batch: Any) -> dict[str, Tensor]:
        names, parameters = zip(*model.named_parameters(), strict=True)
        found = torch.autograd.grad(task.loss(model, batch), parameters, allow_unused=True)
        pairs = zip(names, parameters, found, strict=True)
        return {name: torch.zeros_like(p) if g is None else g for name, p, g in pairs}

    return compute


@pytest.fixture
def line(plain_task: type[PlainTask]) -> tuple[nn.Module, Catalog, Any]:
    """One weight row (3,) under a loss that is linear in it, so that the gradient of a sample is the sample."""
    model = nn.Sequential(nn.Linear(2, 1, bias=False)).double()
    images = torch.tensor([[1.0, 0.0], [3.0, 0.0], [-1.0, 2.0], [1.0, 2.0]], dtype=torch.float64)
    task = plain_task(images, torch.zeros(4), lambda out, y: out[:, 0])
    site = Site("0", "0", "linear", (1, 2), False, 0, "other", ("weight",))
    return model, Catalog((site,), (), 2, 0, 1), task
