"""torch's gradient hooks, which it does not type, and the precision of a forward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Amp", "backward", "forward_in", "when_complete", "when_known"]

Amp = Literal["off", "bf16"]
"""Whether the forward pass runs under autocast to bfloat16. Parameters and sums of gradients stay as they are."""


def forward_in(amp: Amp, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """The context of a forward pass; the backward pass follows outside of it, in the precision of each operation."""
    # Not a disabled autocast: a caller's own is left alone.
    return torch.autocast(device.type, torch.bfloat16) if amp == "bf16" else contextlib.nullcontext()


def backward(loss: Tensor) -> None:
    """Run the backward pass."""
    loss.backward()  # type: ignore[no-untyped-call]  # torch does not type it


def when_complete(leaf: Tensor, act: Callable[[Tensor], None]) -> Callable[[], None]:
    """Call `act(leaf)` whenever the backward pass has completed `leaf.grad`; the return value takes the hook away."""
    handle = leaf.register_post_accumulate_grad_hook(act)  # type: ignore[no-untyped-call]  # torch does not type it
    remove: Callable[[], None] = handle.remove
    return remove


def when_known(tensor: Tensor, act: Callable[[Tensor], None]) -> None:
    """Call `act(gradient)` when the backward pass reaches an activation; the hook goes with its graph."""
    tensor.register_hook(act)  # type: ignore[no-untyped-call]  # torch does not type it
