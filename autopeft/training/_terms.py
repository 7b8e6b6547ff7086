"""What shapes a training step besides the task's loss: the adapters' own terms and the study's regularisers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from autopeft.core.contracts import Inserted, Regulariser, Task
from autopeft.errors import UsageError
from autopeft.training.seeds import derive_seed

__all__ = ["Step", "Terms"]


@dataclass(slots=True)
class Step:
    """One training step, as regularisers see it; see `autopeft.core.contracts.StepState`."""

    inserted: Inserted
    task: Task
    batch: Any
    step: int
    total: int
    seen: dict[str, Tensor] = field(default_factory=dict)

    def _get(self, name: str) -> Tensor:
        if name not in self.seen:
            raise UsageError(
                f"a regulariser asks for the {name} of this step, and {type(self.task).__name__}.loss has not run the "
                f"model on the batch (or its {name} are no tensor)"
            )
        return self.seen[name]

    @property
    def loss(self) -> Tensor:
        """The task's loss, with its graph."""
        return self._get("loss")

    @property
    def logits(self) -> Tensor:
        """What the model returned, with its graph."""
        return self._get("logits")

    @property
    def features(self) -> Tensor:
        """What reached the head, with its graph."""
        return self._get("features")


class Terms:
    """The regularisers of one training, at work.

    Args:
        inserted: the model with adapters.
        task: the task.
        regularisers: name to regulariser.
        seed: seed of the training.
    """

    def __init__(self, inserted: Inserted, task: Task, regularisers: Mapping[str, Regulariser], seed: int) -> None:
        self._inserted = inserted
        self._task = task
        self._terms = {
            name: regulariser.begin(inserted, task, derive_seed(seed, f"regulariser {name}"))
            for name, regulariser in regularisers.items()
        }
        self._step: Step | None = None

    @contextmanager
    def watching(self, batch: Any, step: int, total: int) -> Iterator[None]:
        """Note what the model makes of the batch while the task computes its loss; free without regularisers."""
        if not self._terms:
            yield
            return
        now = self._step = Step(self._inserted, self._task, batch, step, total)

        def note(name: str, value: Any) -> None:
            # The first pass over the batch is the one that the loss is of.
            if isinstance(value, Tensor):
                now.seen.setdefault(name, value)

        model = self._inserted.model
        hooks = [model.register_forward_hook(lambda m, args, out: note("logits", out))]
        head = self._head()
        if head is not None:
            hooks.append(head.register_forward_pre_hook(lambda m, args: note("features", args[0] if args else None)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def added_to(self, loss: Tensor) -> Tensor:
        """The loss with every term added."""
        penalty = self._inserted.penalty()
        total = loss if penalty is None else loss + penalty.to(loss.dtype)
        if self._step is not None:
            self._step.seen["loss"] = loss
            for term in self._terms.values():
                extra = term.add(self._step)
                if extra is not None:
                    total = total + extra.to(total.dtype)
        return total

    def adjust(self) -> None:
        """Let the regularisers change the gradients; the step is forgotten, and its graph with it."""
        if self._step is not None:
            for term in self._terms.values():
                term.adjust(self._step)
            self._step = None

    def state(self) -> dict[str, Tensor]:
        """`NAME/TENSOR` of every regulariser."""
        return {f"{name}/{key}": value for name, term in self._terms.items() for key, value in term.state().items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take up what `state` gave."""
        for name, term in self._terms.items():
            prefix = f"{name}/"
            term.load_state({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})

    def _head(self) -> nn.Module | None:
        """The first module that holds parameters of the head."""
        mine = {id(p) for p in self._inserted.groups().get("head", [])}
        modules = self._inserted.model.modules()
        return next((m for m in modules if any(id(p) in mine for p in m.parameters(recurse=False))), None)
