"""Consistency: two passes with different noise agree."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from autopeft.core.contracts import Inserted, StepState, Task, Term
from autopeft.errors import UsageError
from autopeft.regularisers._teacher import divergence, log_probabilities, look
from autopeft.regularisers._term import BaseTerm, check_weight

__all__ = ["Consistency"]


@dataclass(frozen=True, slots=True)
class Consistency:
    """Adds `weight / 2 * (KL(p || q) + KL(q || p))` for two passes p, q over the batch, no gradient into a target.

    What differs between the passes is the model's own noise: experts that are drawn (MoSA), dropout of adapters, and
    that of the base where the backend leaves it on. Without any the term is zero. Zhang et al., 2023 (MoSA), arXiv
    2312.02923, section 3; Wu et al., 2021 (R-Drop), arXiv 2106.14448. Classes lie on axis 1 of the logits. The second
    pass has gradients: a step takes about twice as long.

    Attributes:
        weight: of the term; 0 switches it off.
        second: weight of the task's loss of the second pass; MoSA's code has the choice, and 0.
    """

    weight: float = 1.0
    second: float = 0.0

    def __post_init__(self) -> None:
        check_weight("consistency", self.weight)
        if not 0 <= self.second < float("inf"):
            raise UsageError(f"consistency: second must be a number of at least 0, got {self.second!r}")

    def begin(self, inserted: Inserted, task: Task, seed: int) -> Term:
        """Nothing is prepared; a weight of 0 also drops the second loss."""
        return _TwoPasses(self) if self.weight else BaseTerm()


class _TwoPasses(BaseTerm):
    """The second pass, and how far it is from the first."""

    def __init__(self, settings: Consistency) -> None:
        self._settings = settings

    def add(self, state: StepState) -> Tensor | None:
        """The weighted divergences, and the second loss where it is asked for."""
        other = look(state.task, state.inserted.model, state.batch)
        p, q = log_probabilities(state.logits), log_probabilities(other.logits)
        term = 0.5 * self._settings.weight * (divergence(p.detach(), q) + divergence(q.detach(), p))
        return term + self._settings.second * other.loss if self._settings.second else term
