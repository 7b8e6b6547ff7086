"""torch's gradient hooks, which it does not type."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

__all__ = ["backward", "when_complete", "when_known"]


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
