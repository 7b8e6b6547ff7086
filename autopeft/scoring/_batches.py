"""Which samples a scorer looks at, in portions of the size it wants."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from autopeft.core.contracts import Task
from autopeft.errors import DataError, UsageError

if TYPE_CHECKING:
    from autopeft.scoring.gradient import Gradient

__all__ = ["Portion", "portions", "size_of", "take"]


class Portion(NamedTuple):
    """One micro-batch.

    Attributes:
        batch: what the task's `loss` takes.
        samples: samples in it.
        half: 0 for a batch of the first half of the pass, 1 for one of the second.
    """

    batch: Any
    samples: int
    half: int


def portions(task: Task, settings: Gradient, seed: int) -> Iterator[Portion]:
    """The micro-batches of one scoring pass over the inner split.

    Raises:
        DataError: when the inner split is empty, or halves were asked for and there is but one batch.
    """
    left = min(task.sizes["inner"], settings.max_samples or task.sizes["inner"])
    planned = min(math.ceil(left / settings.batch_size), settings.max_batches or left)
    if planned < 1 + settings.halves:
        raise DataError(
            f"scoring needs at least {1 + settings.halves} batches of the inner split, which has "
            f"{task.sizes['inner']} samples in {planned} batches of {settings.batch_size}; lower scorer.batch_size"
        )
    order = seed if settings.order == "shuffled" else None
    batches = task.batches("inner", seed=order, batch_size=settings.batch_size)
    for number, batch in zip(range(planned), batches, strict=False):
        found = size_of(batch)
        samples = min(found, left)
        left -= samples
        half = int(settings.halves and number >= math.ceil(planned / 2))
        yield Portion(batch if samples == found else take(batch, 0, samples), samples, half)
        if not left:
            return


def size_of(batch: Any) -> int:
    """Samples in a batch: the length of the first tensor in it."""
    for tensor in _tensors(batch):
        return int(tensor.shape[0])
    raise UsageError(f"cannot tell the size of a batch without tensors: {type(batch).__name__}")


def take(batch: Any, start: int, stop: int) -> Any:
    """Samples `start` to `stop` of a batch: every tensor in its tuples, lists and mappings, cut alike."""
    if isinstance(batch, Tensor):
        return batch[start:stop]
    if isinstance(batch, Mapping):
        return {key: take(value, start, stop) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(take(value, start, stop) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(take(value, start, stop) for value in batch)
    return batch


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _tensors(value)
    elif isinstance(batch, list | tuple):
        for value in batch:
            yield from _tensors(value)
