"""Squared gradients of single samples, from one pass over a whole batch where the layers allow it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from autopeft.core.contracts import Task
from autopeft.core.site import Catalog, Slot
from autopeft.errors import UsageError
from autopeft.scoring._batches import take
from autopeft.scoring._formulas import FORMULA_ERRORS, sample_gradients
from autopeft.scoring._hooks import backward, forward_in, when_complete, when_known
from autopeft.scoring._hosts import Hosts
from autopeft.scoring._moments import Moments
from autopeft.scoring._streaming import Streaming, refuse_reentrant, usable_loss
from autopeft.scoring._taps import Blocks, Tap, dropping, requiring, taps_of

if TYPE_CHECKING:
    from autopeft.scoring.gradient import Gradient

__all__ = ["PerSample"]

_CLOSE = 1e-3
"""Largest deviation of a formula's sum over samples from autograd's gradient, relative to its largest entry."""

_NOISE = 1e-6
"""The same relative to the largest entry of all gradients: a key bias has a gradient of rounding errors alone."""


class PerSample:
    """The per-sample engine.

    The first batch of at least two samples decides tensor by tensor which way is exact. (1) Layers: a formula
    (`sample_gradients`) is used when the loss of the first sample reaches the first sample's rows of the layer's
    output alone, and the formula's sum over samples is autograd's gradient. (2) Parameters with a leading axis of
    one (class token, position embedding): one copy per sample takes the parameter's place, used under the same two
    conditions. (3) Everything else, such as a layer that runs twice, a norm with an activation inside or a relative
    position table: a forward and backward pass per sample. What is exact does not depend on the precision: it is
    found out without autocast.

    Args:
        model: the model, borrowed, in evaluation mode.
        catalog: its catalogue.
        hosts: the catalogue's tensors.
        blocks: residual blocks to take the output matrix of, by name.
        moments: the sums, by key and by block name; filled as gradients arrive.
        settings: the scorer.
    """

    def __init__(
        self,
        model: nn.Module,
        catalog: Catalog,
        hosts: Hosts,
        blocks: Blocks,
        moments: dict[str, Moments],
        settings: Gradient,
    ) -> None:
        self._model = model
        self._parameters = hosts.parameters
        self._blocks = blocks
        self._moments = moments
        self._settings = settings
        self._device = next(iter(hosts.parameters.values())).device
        self._taps, self._held = taps_of(model, catalog, hosts, blocks)
        self._phase: Literal["layout", "check", "measure"] = "measure"
        self._samples = 0
        self._half = 0
        self._forward = False
        # Filled by the first batch: what the formulas, and what the copies, are exact for.
        self._ready = False
        self._by_formula: set[str] = set()
        self._by_copy: set[str] = set()
        self._rest: set[str] = set()
        # Working memory of that batch.
        self._uses: dict[str, int] = {}
        self._mixed: set[str] = set()
        self._sums: dict[str, Tensor] = {}
        self._error: dict[str, tuple[float, float]] = {}
        self._true: dict[str, Tensor] = {}

    def step(self, task: Task, batch: Any, samples: int, half: int) -> None:
        """Add the gradients of every sample of a batch.

        Raises:
            Diverged: when a loss is not finite.
            UsageError: when the task does not give one loss per sample, or the model uses reentrant checkpointing.
        """
        self._samples, self._half = samples, half
        if samples == 1:
            self._one_by_one(task, batch, 1, (*self._parameters, *self._blocks))
            return
        self.decide(task, batch, samples)
        if self._by_formula or self._by_copy:
            self._together(task, batch)
        if self._rest:
            self._one_by_one(task, batch, samples, self._rest)

    def decide(self, task: Task, batch: Any, samples: int) -> None:
        """Find out which way is exact, unless that is known; batches of one sample tell nothing.

        Raises:
            AutopeftError: as `step` does.
        """
        if self._ready or samples == 1:
            return
        self._samples = samples
        self._decide(task, batch)

    # -- the three ways ------------------------------------------------------------------------------------------

    def _together(self, task: Task, batch: Any) -> None:
        """Formulas and copies: one pass over the whole batch."""
        self._phase = "measure"
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._tapped())
            # An output matrix needs the graph in front of its block, whichever parameters make it.
            blocks = self._by_formula & set(self._blocks)
            stack.enter_context(requiring(self._parameters, self._parameters if blocks else self._by_formula))
            for key in self._by_copy:
                leaf = stack.enter_context(self._copied(key))
                stack.callback(when_complete(leaf, self._copy_consumer(key)))
            backward(self._losses(task, batch).sum())

    def _one_by_one(self, task: Task, batch: Any, samples: int, keys: Collection[str]) -> None:
        """A pass per sample."""
        parameters = {key: p for key, p in self._parameters.items() if key in keys}
        blocks = {name: block for name, block in self._blocks.items() if name in keys}
        streaming = Streaming(parameters, blocks, self._moments, self._settings.halves)
        needed = self._parameters if blocks else parameters
        dropped = [p for key, p in needed.items() if key not in parameters]
        with streaming.attached(), dropping(dropped), requiring(self._parameters, needed):
            for i in range(samples):

                def loss(i: int = i) -> Tensor:
                    with self._precision():
                        return task.losses(self._model, take(batch, i, i + 1)).sum()

                streaming.step(loss, 1.0, self._half)

    # -- which way is exact --------------------------------------------------------------------------------------

    def _decide(self, task: Task, batch: Any) -> None:
        with self._tapped():
            self._phase = "layout"
            losses = self._losses(task, batch)
            refuse_reentrant(losses)
            backward(losses[0])
            self._phase = "check"
            backward(self._losses(task, batch).sum())
        largest = max((scale for _, scale in self._error.values()), default=0.0)
        for name, tap in self._taps.items():
            if self._uses.get(name, 0) != 1 or name in self._mixed:
                continue
            for slot, key in tap.keys.items():
                error, scale = self._error.get(key, (0.0 if slot == "output" else torch.inf, 0.0))
                if error <= max(_CLOSE * scale, _NOISE * largest):
                    self._by_formula.add(key)
        self._by_copy = {key for key in self._held if key in self._true and self._copy_fits(task, batch, key)}
        arrived = {*self._error, *self._true, *(name for name in self._blocks if name in self._uses)}
        self._rest = arrived - self._by_formula - self._by_copy
        self._sums.clear()
        self._true.clear()
        self._ready = True

    def _copy_fits(self, task: Task, batch: Any, key: str) -> bool:
        """Whether one copy per sample can take the place of a parameter: same sum, no mixing of samples."""
        true = self._true[key]
        try:
            with requiring(self._parameters, ()), self._copied(key) as leaf:
                (first,) = torch.autograd.grad(self._losses(task, batch)[0], leaf)
                (every,) = torch.autograd.grad(self._losses(task, batch).sum(), leaf)
        except (UsageError, *FORMULA_ERRORS):
            return False
        error = (every.sum(0, keepdim=True) - true).abs().max()
        return not bool(first[1:].any()) and bool(error <= _CLOSE * true.abs().max())

    # -- hooks ---------------------------------------------------------------------------------------------------

    def _losses(self, task: Task, batch: Any) -> Tensor:
        self._forward = True
        try:
            with self._precision():
                losses = usable_loss(task.losses(self._model, batch))
        finally:
            # Non-reentrant checkpointing calls the modules again during the backward pass.
            self._forward = False
        if losses.shape != (self._samples,):
            raise UsageError(
                f"per-sample scores need one loss per sample, shape ({self._samples},), and the task gives "
                f"{tuple(losses.shape)}; use scorer.mode=per_batch"
            )
        return losses

    def _precision(self) -> contextlib.AbstractContextManager[object]:
        deciding = not self._ready and self._samples > 1
        return forward_in("off" if deciding else self._settings.amp, self._device)

    @contextlib.contextmanager
    def _tapped(self) -> Iterator[None]:
        """Have the hooks on the layers, and on the parameters that the formulas are for."""
        with contextlib.ExitStack() as stack:
            for name, tap in self._taps.items():
                if not self._ready or any(key in self._by_formula for key in tap.keys.values()):
                    stack.callback(tap.module.register_forward_hook(self._watcher(name, tap)).remove)
            for key, parameter in self._parameters.items():
                stack.callback(when_complete(parameter, self._consumer(key)))
            yield

    @contextlib.contextmanager
    def _copied(self, key: str) -> Iterator[Tensor]:
        """One copy per sample in the place of a parameter; the parameter is back on exit."""
        module, name = self._held[key]
        parameter = self._parameters[key]
        leaf = parameter.detach().expand(self._samples, *parameter.shape[1:]).clone().requires_grad_()
        slots: dict[str, Any] = module._parameters
        slots[name] = leaf
        try:
            yield leaf
        finally:
            slots[name] = parameter

    def _watcher(self, name: str, tap: Tap) -> Callable[[nn.Module, Any, Any], None]:
        def watch(module: nn.Module, inputs: Any, output: Any) -> None:
            y = output[0] if isinstance(output, tuple | list) and output else output
            if not self._forward or not isinstance(y, Tensor) or not y.requires_grad:
                return
            if tap.site.kind == "block":
                x = y.detach().clone()  # later layers may change it in place
            elif inputs and isinstance(inputs[0], Tensor):
                x = inputs[0].detach()
                if self._settings.amp != "off":
                    x = x.to(y.dtype)  # as the layer itself multiplied it
            else:
                return
            if self._phase == "layout":
                self._uses[name] = self._uses.get(name, 0) + 1
            when_known(y, lambda dy: self._arrived(name, tap, x, dy))

        return watch

    def _arrived(self, name: str, tap: Tap, x: Tensor, dy: Tensor) -> None:
        if self._phase == "layout":
            rows, left_over = divmod(len(dy), self._samples)
            if left_over or bool(dy[rows:].any()) or len(x) != len(dy):
                self._mixed.add(name)
        elif self._phase == "measure":
            for slot, key in tap.keys.items():
                if key in self._by_formula:
                    self._measure(tap, slot, key, x, dy)
        elif name not in self._mixed:
            for slot, key in tap.keys.items():
                if slot == "output":
                    continue
                try:
                    self._sums[key] = sum(g.sum(0) for g in self._chunks(tap, slot, x, dy))  # type: ignore[assignment]
                except FORMULA_ERRORS:
                    self._mixed.add(name)

    def _measure(self, tap: Tap, slot: Slot, key: str, x: Tensor, dy: Tensor) -> None:
        moments = self._moments_of(key, tap, dy)
        if tap.site.kind == "linear" and slot == "weight" and x.numel() == self._samples * x.shape[-1]:
            # One token per sample: the square of an outer product is the outer product of the squares.
            dy, x = (t.reshape(self._samples, -1).to(moments.second.dtype) for t in (dy, x))
            moments.second.addmm_(dy.square().mT, x.square())
            return
        for gradients in self._chunks(tap, slot, x, dy):
            if slot == "output":
                moments.add_samples(gradients, self._half)
            else:
                moments.add_squares(gradients)

    def _chunks(self, tap: Tap, slot: Slot, x: Tensor, dy: Tensor) -> Iterator[Tensor]:
        """Gradients of a few samples at a time: (samples, *shape)."""
        rows = len(dy) // self._samples
        for start in range(0, self._samples, self._settings.chunk):
            n = min(self._settings.chunk, self._samples - start)
            part = slice(start * rows, (start + n) * rows)
            a, b = x[part], dy[part]
            if self._settings.amp != "off":
                a, b = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (a, b))
            yield sample_gradients(tap.site, tap.module, slot, a, b, n)

    def _consumer(self, key: str) -> Callable[[Tensor], None]:
        def consume(parameter: Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            assert gradient is not None
            if self._phase == "measure" and key in self._by_formula:
                self._moments_of(key).first[self._half].add_(gradient)
            elif self._phase == "check":
                if key in self._held:
                    self._true[key] = gradient
                    return
                found = self._sums.pop(key, None)
                fits = found is not None and found.shape == gradient.shape
                error = float((found - gradient).abs().max()) if fits and found is not None else torch.inf
                self._error[key] = (error, float(gradient.abs().max()))

        return consume

    def _copy_consumer(self, key: str) -> Callable[[Tensor], None]:
        def consume(leaf: Tensor) -> None:
            gradients, leaf.grad = leaf.grad, None
            assert gradients is not None
            self._moments_of(key).add_samples(gradients.unsqueeze(1), self._half)

        return consume

    def _moments_of(self, key: str, tap: Tap | None = None, like: Tensor | None = None) -> Moments:
        if key not in self._moments:
            if key in self._parameters:
                parameter = self._parameters[key]
                shape, like = parameter.shape, parameter
            else:
                assert tap is not None
                assert like is not None
                shape = torch.Size((tap.site.shape[0], tap.site.shape[0]))
            self._moments[key] = Moments(shape, like, self._settings.halves)
        return self._moments[key]
