"""A model small enough to train in milliseconds, with adapters in it that need no backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autopeft.core.allocation import Allocation
from autopeft.core.budget import Budget, Cost
from autopeft.core.menu import Option
from autopeft.core.site import Place

RANK, WIDTH, FEATURES, CLASSES = 2, 12, 3 * 8 * 8, 4


@dataclass(frozen=True)
class FakeMethod:
    family: str = "matrix"


class LowRank(nn.Module):
    """up @ down with up = 0 at the start, and a scale per output."""

    def __init__(self, inputs: int, outputs: int, generator: torch.Generator) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(RANK, inputs, generator=generator) * inputs**-0.5)
        self.up = nn.Parameter(torch.zeros(outputs, RANK))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.down.T @ self.up.T + self.bias


class Net(nn.Module):
    def __init__(self, generator: torch.Generator, dropout: float) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, WIDTH)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(WIDTH, CLASSES)
        self.used = True
        self.adapter: LowRank | None = None
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator) * (0.3 if p.ndim == 1 else p.shape[-1] ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        hidden = self.first(x)
        if self.adapter is not None and self.used:
            hidden = hidden + self.adapter(x)
        return self.head(self.dropout(torch.relu(hidden)))


class FakeInserted:
    """What a backend yields, made by hand."""

    def __init__(self, seed: int = 0, dropout: float = 0.0, price: int | None = None) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.model = Net(generator, dropout)
        self.model.requires_grad_(False)
        self.model.head.requires_grad_(True)
        self.adapter = LowRank(FEATURES, WIDTH, generator)
        self.model.adapter = self.adapter
        self.modes: list[bool] = []
        cost = Cost.plain(self.trainable_count() if price is None else price, 1)
        option = Option("first", "lora", RANK, cost, 0.0, (Place("first", "weight"),))
        self.allocation = Allocation((option,), Budget(10**6))

    def groups(self) -> Mapping[str, list[nn.Parameter]]:
        return {"lora": list(self.adapter.parameters()), "head": list(self.model.head.parameters())}

    def named_adapters(self) -> Mapping[str, nn.Module]:
        return {"first/lora": self.adapter}

    def trainable_count(self) -> int:
        return sum(p.numel() for p in self.adapter.parameters())

    def train_mode(self, mode: bool = True) -> None:
        self.modes.append(mode)
        self.model.train(mode)

    def state(self) -> dict[str, Tensor]:
        adapter = {f"adapter/first/lora/{n}": p.detach().clone() for n, p in self.adapter.named_parameters()}
        head = {f"head/{n}": p.detach().clone() for n, p in self.model.head.named_parameters()}
        return {**adapter, "buffer/first/lora/scale": torch.ones(3), **head}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        assert set(state) == set(self.state())
        with torch.no_grad():
            for name, p in self.adapter.named_parameters():
                p.copy_(state[f"adapter/first/lora/{name}"])
            for name, p in self.model.head.named_parameters():
                p.copy_(state[f"head/{name}"])

    def prepare(self, task: Any, seed: int) -> None:
        self.prepared = seed

    def advance(self, step: int, total: int) -> list[nn.Parameter]:
        return []

    def penalty(self) -> Tensor | None:
        return None

    def merged_state(self) -> dict[str, Tensor]:
        raise NotImplementedError


@pytest.fixture
def insert() -> Callable[..., Any]:
    return FakeInserted


@pytest.fixture
def methods() -> dict[str, FakeMethod]:
    return {"lora": FakeMethod()}


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
