"""Models whose every number is known, and steps to show a regulariser."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autopeft.backends.native import Native
from autopeft.core.allocation import Allocation
from autopeft.core.budget import Budget
from autopeft.core.contracts import Inserted, Method
from autopeft.core.menu import Indices, Option
from autopeft.models.scan import scan
from autopeft.testing.toy_task import ToyTask
from autopeft.training._terms import Step


class Scripted(nn.Module):
    """Returns what it was given, one answer per pass, whatever the batch is."""

    def __init__(self, *answers: Tensor) -> None:
        super().__init__()
        self.head = nn.Linear(1, 1)
        self.answers = list(answers)
        self.modes: list[bool] = []

    def forward(self, batch: Any) -> Tensor:
        self.modes.append(self.training)
        return self.answers.pop(0)


class ScriptedInserted:
    """A model and a teacher that give the answers of a script."""

    def __init__(
        self, model: Scripted, teacher: Scripted | None = None, parameters: Sequence[nn.Parameter] = ()
    ) -> None:
        self.model = model
        self.teacher = teacher
        self.parameters = list(parameters)

    def groups(self) -> dict[str, list[nn.Parameter]]:
        return {"a": self.parameters, "head": []}

    def named_adapters(self) -> dict[str, nn.Module]:
        return {}

    @contextmanager
    def plain(self) -> Iterator[nn.Module]:
        assert self.teacher is not None
        with torch.no_grad():
            yield self.teacher


class AnyTask:
    """Runs the model, and calls the mean of what it returns the loss."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return model(batch).mean()


@pytest.fixture
def scripted() -> Callable[..., Any]:
    """What a step shows of a model with these logits under a teacher with those."""

    def make(
        logits: Tensor,
        *,
        again: Tensor | None = None,
        teacher: Tensor | None = None,
        parameters: Sequence[nn.Parameter] = (),
        step: int = 0,
    ) -> Step:
        model = Scripted(*(() if again is None else (again,)))
        inserted: Any = ScriptedInserted(model, None if teacher is None else Scripted(teacher), parameters)
        task: Any = AnyTask()
        return Step(inserted, task, None, step, 10, {"logits": logits, "loss": logits.mean()})

    return make


@pytest.fixture
def insert() -> Iterator[Callable[..., Inserted]]:
    """Adapters in any model: (site, key, method, size) each; sparse ones take the first entries unless told."""
    with ExitStack() as stack:

        def make(
            model: nn.Module, *choices: tuple[str, str, Method, int], entries: Sequence[int] = (), **backend: Any
        ) -> Inserted:
            catalog = scan(model)
            options = []
            for name, key, method, size in choices:
                site = catalog[name]
                places = tuple(sorted(catalog.places(site, method.slots(site))))
                chosen = Indices(np.array(entries, dtype=np.int64)) if entries else None
                options.append(Option(name, key, size, method.cost(site, size), 0.0, places, chosen))
            plan = Allocation(tuple(options), Budget(10**9))
            methods = {key: method for _, key, method, _ in choices}
            return stack.enter_context(Native(**backend).insert(model, catalog, plan, methods, seed=0))

        yield make


@pytest.fixture
def step_of() -> Callable[..., Step]:
    """A real step of an inserted model on a toy task: the model has run on the batch."""

    def make(inserted: Inserted, step: int = 0, task: ToyTask | None = None) -> Step:
        task = task or ToyTask()
        batch = next(iter(task.batches("inner", 1)))
        state = Step(inserted, task, batch, step, 10)
        kept: list[Any] = []
        head = inserted.model.get_submodule("head")
        hook = head.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
        logits = inserted.model(batch[0])
        hook.remove()
        state.seen.update(logits=logits, features=kept[0], loss=F.cross_entropy(logits, batch[1]))
        return state

    return make
