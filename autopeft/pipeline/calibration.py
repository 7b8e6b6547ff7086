"""Some samples that a compressed model is compared with the trained one on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from autopeft.compression.inputs import mean_inputs
from autopeft.compression.loader import patched
from autopeft.compression.settings import CompressionSettings

if TYPE_CHECKING:
    from torch import Tensor, nn

    from autopeft.pipeline.prepare import Prepared

__all__ = ["Calibration"]


class Calibration:
    """The loss and the output of a plain model, with one change or another, on a few samples.

    Args:
        prepared: the task.
        model: a copy of the plain model; its weights are overwritten.
        base: its state dict before any change.
        parts: the change as it was trained.
        settings: which samples, and what they are judged by.
    """

    def __init__(
        self,
        prepared: Prepared,
        model: nn.Module,
        base: Mapping[str, Tensor],
        parts: Mapping[str, Tensor],
        settings: CompressionSettings,
    ) -> None:
        self._task, self._model, self._base, self._by = prepared.task, model, base, settings.choose
        self._batches: list[Any] = []
        seen = 0
        self.load(parts)
        self._trained: list[Tensor] = []
        for batch in self._task.batches(settings.choose_on, seed=settings.seed):
            losses, output = self._run(batch)
            self._batches.append(batch)
            self._trained.append(output)
            seen += len(losses)
            if seen >= settings.samples:
                break
        self._seen = seen

    def load(self, parts: Mapping[str, Tensor]) -> None:
        """Make the model the base with these parts."""
        self._model.load_state_dict(patched(self._base, parts))

    def objective(self, parts: Mapping[str, Tensor]) -> float:
        """The mean loss with these parts, or the mean absolute change of the output; infinite when it is not finite."""
        self.load(parts)
        total = 0.0
        for batch, trained in zip(self._batches, self._trained, strict=True):
            losses, output = self._run(batch)
            change = losses if self._by == "loss" else (output - trained).abs().flatten(1).mean(dim=1)
            total += float(change.double().sum())
        return total / self._seen if math.isfinite(total) else math.inf

    def inputs(self, weights: Sequence[str], parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The mean of what each weight is multiplied with in the model with these parts."""
        self.load(parts)
        return mean_inputs(self._model, weights, lambda: [self._run(batch) for batch in self._batches])

    def _run(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Per-sample losses and the model's output, whatever the task makes of it."""
        outputs: list[Tensor] = []

        def keep(module: nn.Module, given: Any, output: Any) -> None:
            found: Tensor = getattr(output, "logits", output)
            outputs.append(found.detach())

        handle = self._model.register_forward_hook(keep)
        try:
            with torch.no_grad():
                losses = self._task.losses(self._model, batch)
        finally:
            handle.remove()
        return losses, outputs[-1]
