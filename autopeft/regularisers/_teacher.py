"""Looking at what a model makes of a batch, and at the frozen model as a teacher."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autopeft.core.contracts import Inserted, Task
from autopeft.errors import UsageError

__all__ = ["Seen", "divergence", "head_path", "log_probabilities", "look", "teacher"]


@dataclass(frozen=True, slots=True)
class Seen:
    """What one pass over a batch gave.

    Attributes:
        loss: the task's loss.
        logits: what the model returned.
        features: what reached the head; None when it was not asked for.
    """

    loss: Tensor
    logits: Tensor
    features: Tensor | None


@contextmanager
def teacher(inserted: Inserted) -> Iterator[nn.Module]:
    """The model as it was before training, in evaluation mode whatever mode it is in; no gradients."""
    with inserted.plain() as model:
        modes = [(module, module.training) for module in model.modules()]
        for module, _ in modes:
            module.training = False
        try:
            yield model
        finally:
            for module, mode in modes:
                module.training = mode


def look(task: Task, model: nn.Module, batch: Any, head: str | None = None) -> Seen:
    """Run the task's loss on a batch and keep what the model returned.

    Args:
        task: knows how to feed the batch to the model.
        model: in the mode it is meant to run in.
        batch: one batch of the task.
        head: dotted path of the module whose input is wanted.

    Raises:
        UsageError: when the model does not return one tensor, or the head is not given one.
    """
    seen: dict[str, Any] = {}

    def note(name: str, value: Any) -> None:
        # The first pass over the batch is the one that the loss is of.
        seen.setdefault(name, value)

    hooks = [model.register_forward_hook(lambda module, args, out: note("logits", out))]
    if head is not None:
        module = model.get_submodule(head)
        hooks.append(module.register_forward_pre_hook(lambda m, args: note("features", args[0] if args else None)))
    try:
        loss = task.loss(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    for name in ("logits",) if head is None else ("logits", "features"):
        if not isinstance(seen.get(name), Tensor):
            raise UsageError(
                f"a regulariser needs the {name} of a batch as one tensor; {type(model).__name__} under "
                f"{type(task).__name__}.loss gives {type(seen.get(name)).__name__}"
            )
    return Seen(loss, seen["logits"], seen.get("features"))


def head_path(inserted: Inserted) -> str:
    """Dotted path of the one module that holds the head's parameters.

    Raises:
        UsageError: when there is none, or several.
    """
    mine = {id(p) for p in inserted.groups().get("head", [])}
    holding: list[str] = [
        name
        for name, module in inserted.model.named_modules()
        if any(id(p) in mine for p in module.parameters(recurse=False))
    ]
    if len(holding) != 1:
        raise UsageError(f"a regulariser of features needs a head of one module, the model has {holding or 'none'}")
    return holding[0]


def log_probabilities(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """`log softmax(logits / temperature)` over axis 1, in float32 at least."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.log_softmax(wide / temperature, dim=1)


def divergence(target: Tensor, given: Tensor) -> Tensor:
    """`KL(target || given)` of log-probabilities with the classes on axis 1: the mean over everything else."""
    return (target.exp() * (target - given)).sum(1).mean()
