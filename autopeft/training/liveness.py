"""Every adapter that was paid for must receive a gradient."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from autopeft.errors import DeadAdapter

__all__ = ["Liveness"]

_MIN_STEPS = 2
"""LoRA's A has a zero gradient until B has moved, so one step proves nothing."""


class Liveness:
    """Watches the adapters' gradients until each has been seen alive.

    After the first backward pass no gradient may be missing: a host whose forward is never called (a fused projection
    used through its weight) leaves it None. By the end of the first epoch, and after at least two steps, every adapter
    must have had a gradient that is not zero. A whole epoch, because a single entry behind a ReLU may well be silent in
    two batches.

    Args:
        adapters: option key (`site/method`) to adapter.
    """

    def __init__(self, adapters: Mapping[str, nn.Module]) -> None:
        self._pending = {
            key: tuple(p for p in module.parameters() if p.requires_grad) for key, module in adapters.items()
        }
        self._steps = 0

    @property
    def done(self) -> bool:
        """Whether every adapter has been seen alive."""
        return not self._pending

    def after_backward(self) -> None:
        """Look at the gradients; call it after each backward pass while not `done`.

        Raises:
            DeadAdapter: naming the options with a parameter without gradient.
        """
        self._steps += 1
        if self._steps == 1:
            missing = [key for key, params in self._pending.items() if any(p.grad is None for p in params)]
            if missing:
                raise DeadAdapter(
                    f"{_some(missing)} received no gradient in the first backward pass: the forward of the host module "
                    "is not called, so the adapter costs budget and does nothing; leave these sites out of the plan"
                )
        self._pending = {key: params for key, params in self._pending.items() if not _alive(params)}

    def at_epoch_end(self) -> None:
        """Judge the adapters that have had no gradient but zero, once two steps have been seen.

        Raises:
            DeadAdapter: naming their options.
        """
        if self._steps >= _MIN_STEPS and self._pending:
            raise DeadAdapter(
                f"{_some(list(self._pending))} had a gradient of exactly zero in each of {self._steps} steps: the "
                "adapter costs budget and cannot learn; leave these options out of the plan"
            )


def _alive(params: tuple[nn.Parameter, ...]) -> bool:
    return any(p.grad is not None and bool(p.grad.count_nonzero()) for p in params)


def _some(keys: list[str], most: int = 5) -> str:
    noun = "the adapter " if len(keys) == 1 else f"{len(keys)} adapters: "
    return noun + ", ".join(keys[:most]) + (", ..." if len(keys) > most else "")
