"""Gradients of whole batches, consumed one tensor at a time while the backward pass runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from autopeft.core.site import Site
from autopeft.errors import Diverged, UsageError
from autopeft.scoring._hooks import backward, when_complete, when_known
from autopeft.scoring._moments import Make, Moments, plain_sums

__all__ = ["Streaming", "channel_rows", "refuse_reentrant", "usable_loss"]


class Streaming:
    """Adds each parameter's gradient to its sums as soon as it is complete, and frees it at once.

    No second full gradient is ever alive: the hook of one tensor has run before the gradient of the next is computed,
    but for those of one layer.

    Args:
        parameters: what to score, by key.
        blocks: residual blocks to take the output matrix of, by name.
        moments: the sums, by key and by block name; filled as gradients arrive.
        halves: whether first moments are kept for each half of the pass.
        make: makes the sums of a tensor when its first gradient arrives.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        blocks: Mapping[str, tuple[Site, nn.Module]],
        moments: dict[str, Moments],
        halves: bool,
        make: Make = plain_sums,
    ) -> None:
        self._parameters = parameters
        self._blocks = blocks
        self._moments = moments
        self._halves = halves
        self._make = make
        self._weight = 1.0
        self._half = 0
        self._arrived: set[str] = set()
        self._pending: dict[str, Tensor] = {}
        self._uses: dict[str, int] = {}
        self._forward = False
        self._checked = False

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Have the hooks on the model."""
        with contextlib.ExitStack() as stack:
            for key, parameter in self._parameters.items():
                stack.callback(when_complete(parameter, self._consumer(key)))
            for name, (site, module) in self._blocks.items():
                stack.callback(module.register_forward_hook(self._watcher(name, site)).remove)
            yield

    def step(self, loss: Callable[[], Tensor], weight: float, half: int) -> None:
        """One forward and backward pass.

        Args:
            loss: computes the loss.
            weight: weight of its gradient in the first moment.
            half: which half of the pass it belongs to.

        Raises:
            Diverged: when the loss is not finite.
            UsageError: when the loss has no gradient, or the model uses reentrant checkpointing.
        """
        self._weight, self._half = weight, half
        self._arrived.clear()
        self._pending.clear()
        self._uses.clear()
        self._forward = True
        try:
            value = usable_loss(loss())
        finally:
            # Non-reentrant checkpointing calls the modules again during the backward pass.
            self._forward = False
        if not self._checked:
            refuse_reentrant(value)
            self._checked = True
        backward(value)

    def _consumer(self, key: str) -> Callable[[Tensor], None]:
        def consume(parameter: Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            if key in self._arrived:
                raise UsageError(
                    f"the gradient of {key} arrived twice in one backward pass: reentrant checkpointing cannot be "
                    "scored; use use_reentrant=False or switch checkpointing off while scoring"
                )
            self._arrived.add(key)
            assert gradient is not None
            if key not in self._moments:
                self._moments[key] = self._make(key, parameter.shape, parameter, self._halves)
            self._moments[key].add(gradient, self._weight, self._half)

        return consume

    def _watcher(self, name: str, site: Site) -> Callable[[nn.Module, object, object], None]:
        def watch(module: nn.Module, inputs: object, output: object) -> None:
            tensor = output[0] if isinstance(output, tuple | list) and output else output
            if not self._forward or not isinstance(tensor, Tensor) or not tensor.requires_grad:
                return
            # A copy: later layers may change the output in place (`x += shortcut`, in-place activations).
            rows = channel_rows(tensor.detach(), site.channel_axis, 1).squeeze(0).clone()
            self._uses[name] = self._uses.get(name, 0) + 1
            when_known(tensor, lambda gradient: self._block(name, site, gradient, rows))

        return watch

    def _block(self, name: str, site: Site, gradient: Tensor, rows: Tensor) -> None:
        found = channel_rows(gradient, site.channel_axis, 1).squeeze(0).T @ rows
        self._uses[name] -= 1
        self._pending[name] = self._pending[name] + found if name in self._pending else found
        if self._uses[name]:
            return
        # A block that runs several times has one matrix: the sum over its runs, squared afterwards.
        matrix = self._pending.pop(name)
        if name not in self._moments:
            self._moments[name] = self._make(name, matrix.shape, matrix, self._halves)
        self._moments[name].add(matrix, self._weight, self._half)


def channel_rows(tensor: Tensor, axis: int, samples: int) -> Tensor:
    """Activations as (samples, tokens, channels).

    Args:
        tensor: activations with the samples outermost along axis 0, which may hold several rows per sample (windows).
        axis: axis of the channels.
        samples: samples in the batch.

    Raises:
        ValueError: when axis 0 cannot be split into the samples.
    """
    if tensor.shape[0] % samples:
        raise ValueError(f"{tensor.shape[0]} rows cannot be split into {samples} samples")
    last = tensor.movedim(axis, -1)
    return last.reshape(samples, -1, last.shape[-1])


def usable_loss(value: Tensor) -> Tensor:
    """The loss, checked.

    Raises:
        Diverged: when it is not finite.
        UsageError: when it has no gradient.
    """
    if not bool(torch.isfinite(value).all()):
        raise Diverged(f"the loss is {value.detach().cpu().tolist()} while scoring; check the weights and the data")
    if not value.requires_grad:
        raise UsageError("the loss does not depend on any parameter of the catalogue; is this the catalogue's model?")
    return value


def refuse_reentrant(value: Tensor) -> None:
    """Refuse a graph in which reentrant checkpointing hides parameters.

    Its backward pass runs another backward pass inside: hooks fire once per use, and where no input of a segment
    requires a gradient the gradients inside are lost.

    Raises:
        UsageError: when the graph holds a reentrant checkpoint.
    """
    todo: list[object] = [value.grad_fn]
    seen: set[object] = set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if type(node).__name__ == "CheckpointFunctionBackward":
            raise UsageError(
                "the model uses reentrant checkpointing, which cannot be scored: use use_reentrant=False or switch "
                "checkpointing off while scoring"
            )
        children: Sequence[tuple[object, int]] = getattr(node, "next_functions", ())
        todo.extend(child for child, _ in children)
