"""Distillation: the trained model stays near the frozen one's predictions."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from autopeft.core.contracts import Inserted, StepState, Task, Term
from autopeft.errors import UsageError
from autopeft.regularisers._teacher import divergence, log_probabilities, look, teacher
from autopeft.regularisers._term import BaseTerm, check_weight

__all__ = ["Distillation"]


@dataclass(frozen=True, slots=True)
class Distillation:
    """Adds `weight * T^2 * KL(teacher || model)`, mean over the batch, at temperature T.

    The teacher is the pre-trained model with the head as it started (the probe's, unless the study switches that off: a
    head of random numbers teaches nothing), in evaluation mode, on the same batch. Hinton et al., 2015, arXiv
    1503.02531, section 2; as a regulariser of fine-tuning, Li and Hoiem, 2016, arXiv 1606.09282. Classes lie on axis 1
    of the logits. Costs one forward pass more per step.

    Attributes:
        weight: of the term; 0 switches it off.
        temperature: T; `T^2` keeps the size of the gradient.
    """

    weight: float = 1.0
    temperature: float = 2.0

    def __post_init__(self) -> None:
        check_weight("distillation", self.weight)
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise UsageError(f"distillation: temperature must be a positive number, got {self.temperature!r}")

    def begin(self, inserted: Inserted, task: Task, seed: int) -> Term:
        """Nothing is prepared."""
        return _Divergence(self) if self.weight else BaseTerm()


class _Divergence(BaseTerm):
    """The divergence from the teacher on every batch."""

    def __init__(self, settings: Distillation) -> None:
        self._settings = settings

    def add(self, state: StepState) -> Tensor | None:
        """The weighted divergence."""
        hot = self._settings.temperature
        with teacher(state.inserted) as model:
            target = log_probabilities(look(state.task, model, state.batch).logits, hot)
        return self._settings.weight * hot**2 * divergence(target, log_probabilities(state.logits, hot))
