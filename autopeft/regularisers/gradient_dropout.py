"""Gradient dropout: parts of the gradient that the frozen model's knowledge contradicts are dropped more often."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autopeft.core.contracts import Inserted, StepState, Task, Term
from autopeft.errors import UsageError
from autopeft.regularisers._changes import note_nothing
from autopeft.regularisers._draw import generator_at
from autopeft.regularisers._teacher import divergence, log_probabilities, look, teacher
from autopeft.regularisers._term import BaseTerm, check_weight

__all__ = ["GradientDropout"]


@dataclass(frozen=True, slots=True)
class GradientDropout:
    """Each entry g of an adapter's gradient becomes `g * ((1 - weight) + weight * [P > U])`, U uniform on [0, 1).

    With h the gradient of `KL(teacher || model)`, `P = (1 + sign(g) (g + h) / (|g| + |h|)) / 2`: 1 where both gradients
    agree, and the less the larger the one that contradicts. The teacher is the frozen model with the head as it
    started, as for `Distillation`. Zheng et al., 2023 (R-AMT), arXiv 2307.15049, equations 7 and 8.

    It works on the adapters' gradients as the backward pass left them, terms of other regularisers included, before
    clipping; the head's are left alone. Costs a forward pass and a backward pass more per step.

    Attributes:
        weight: l of the paper, from 0 (off) to 1.
        temperature: of the divergence.
    """

    weight: float = 1.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_weight("gradient_dropout", self.weight)
        if self.weight > 1:
            raise UsageError(f"gradient_dropout: weight must be at most 1, got {self.weight!r}")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise UsageError(f"gradient_dropout: temperature must be a positive number, got {self.temperature!r}")

    def begin(self, inserted: Inserted, task: Task, seed: int) -> Term:
        """Find the adapters' parameters."""
        if not self.weight:
            return BaseTerm()
        mine = [p for key, group in inserted.groups().items() if key != "head" for p in group]
        if not mine:
            note_nothing("gradient_dropout", "a parameter")
            return BaseTerm()
        return _Dropout(self, mine, seed)


class _Dropout(BaseTerm):
    """Remembers the teacher's gradient of a step until the step's own is there."""

    def __init__(self, settings: GradientDropout, parameters: list[nn.Parameter], seed: int) -> None:
        self._settings = settings
        self._parameters = parameters
        self._seed = seed
        self._known: tuple[Tensor | None, ...] = ()

    def add(self, state: StepState) -> Tensor | None:
        """Nothing; the divergence's gradient is taken while the graph is there."""
        hot = self._settings.temperature
        with teacher(state.inserted) as model:
            target = log_probabilities(look(state.task, model, state.batch).logits, hot)
        term = divergence(target, log_probabilities(state.logits, hot))
        self._known = torch.autograd.grad(term, self._parameters, retain_graph=True, allow_unused=True)
        return None

    def adjust(self, state: StepState) -> None:
        """Drop entries of the adapters' gradients."""
        device = self._parameters[0].device
        generator = generator_at(self._seed, state.step, device)
        weight = self._settings.weight
        for parameter, known in zip(self._parameters, self._known, strict=True):
            draw = torch.rand(parameter.shape, generator=generator, device=device)
            if parameter.grad is None or known is None:
                continue
            grad = parameter.grad
            keep = _keep(grad, known) > draw
            grad.mul_((1 - weight) + weight * keep)
        self._known = ()


def _keep(grad: Tensor, known: Tensor) -> Tensor:
    """P of `GradientDropout`, entry by entry; one half where both gradients are zero."""
    size = (grad.abs() + known.abs()).clamp_min(torch.finfo(grad.dtype).tiny)
    return 0.5 * (1 + grad.sign() * (grad + known) / size)
