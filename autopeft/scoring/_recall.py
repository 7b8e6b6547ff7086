"""The gradient of what a model has memorised."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from autopeft.core.contracts import Recalling, Task
from autopeft.core.site import Catalog
from autopeft.errors import UsageError
from autopeft.scoring._batches import size_of
from autopeft.scoring._measure import measure

if TYPE_CHECKING:
    from autopeft.scoring.gradient import Gradient

__all__ = ["recall_gradient"]


def recall_gradient(
    model: nn.Module, catalog: Catalog, task: Task, settings: Gradient, seed: int
) -> tuple[dict[str, Tensor], int]:
    """The gradient of the task's own measure of memorisation, with respect to every tensor of a catalogue.

    Args:
        model: the model, on its device; left as it was found.
        catalog: its catalogue.
        task: a task that is `Recalling`.
        settings: size of the batches, how many samples at most, precision, and whether blocks' outputs are wanted.
        seed: of the pass, in which nothing is random.

    Returns:
        Per key of the tensors, and per name of a block's site, the gradient on the CPU; and how often a sample was
        passed through the model, with its condition and without.

    Raises:
        AutopeftError: as `measure` does.
        UsageError: when the task measures no memorisation, or has no samples to measure it on.
    """
    if not isinstance(task, Recalling):
        raise UsageError(
            f"{type(task).__name__} has no measure of memorisation of its own, as calibrated.memory=noise_difference "
            "needs; task diffusion has, and calibrated.memory=gap works for every task"
        )
    source = _Recall(task, settings)
    if not source.sizes["inner"]:
        raise UsageError(
            f"{type(task).__name__} has no training samples to measure memorisation on; plant some "
            "(data.spec=...?planted=4&repeat=16) or set calibrated.memory=gap"
        )
    whole = dataclasses.replace(settings, mode="per_batch", halves=False, squares=False, max_batches=None, order="file")
    found = measure(whole, model, catalog, source, seed)  # type: ignore[arg-type]  # what a scoring pass asks of a task
    return {key: known.signal for key, known in found.known.items()}, 2 * found.samples


class _Recall:
    """A task whose loss is what another one calls memorisation."""

    def __init__(self, task: Recalling, settings: Gradient) -> None:
        self._task = task
        self._batches: list[Any] = []
        self.sizes = {"inner": 0}
        for batch in task.recall_batches(settings.batch_size):
            self._batches.append(batch)
            self.sizes["inner"] += size_of(batch)
            if settings.max_samples is not None and self.sizes["inner"] >= settings.max_samples:
                break
        self.data_hash = "recall"

    def batches(self, split: str, seed: int | None = None, batch_size: int | None = None) -> Iterator[Any]:
        yield from self._batches

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return self._task.recall(model, batch)
