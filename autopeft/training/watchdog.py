"""Stops a training whose numbers are no numbers."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from autopeft.errors import Diverged

__all__ = ["Watchdog"]


class Watchdog:
    """Adds up losses, and stops at the first loss or gradient that is not finite.

    Values are read from the device in groups, so that the message names the exact step at a few waits per epoch.

    Args:
        every: steps between two reads; 1 where a read costs nothing.
        describe: makes the message from the step, what it was (`loss`, ...) and its value.
        loss_sum: what the losses are added to.
    """

    def __init__(self, every: int, describe: Callable[[int, str, float], str], loss_sum: float = 0.0) -> None:
        self._every, self._describe, self._sum = every, describe, loss_sum
        self._pending: list[tuple[int, Tensor, Tensor]] = []

    def note(self, step: int, loss: Tensor, norm: Tensor) -> None:
        """Keep the loss and the gradient's norm of a step, scalars on any device."""
        self._pending.append((step, loss, norm))
        if len(self._pending) >= self._every:
            self.look()

    def look(self) -> float:
        """Read what is pending; the sum of all losses.

        Raises:
            Diverged: when one is not finite.
        """
        if self._pending:
            read = torch.stack([torch.stack((loss.float(), norm.float())) for _, loss, norm in self._pending]).tolist()
            for (step, _, _), (loss, norm) in zip(self._pending, read, strict=True):
                if not math.isfinite(loss):
                    raise Diverged(self._describe(step, "loss", loss))
                if not math.isfinite(norm):
                    raise Diverged(self._describe(step, "norm of the gradient", norm))
                self._sum += loss
            self._pending = []
        return self._sum
