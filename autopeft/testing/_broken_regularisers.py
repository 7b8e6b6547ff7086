"""Regularisers that break one law each."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from autopeft.core.contracts import Inserted, Regulariser, StepState, Task, Term
from autopeft.errors import UsageError

__all__ = ["BROKEN"]


class _Term:
    """Pulls the adapters' parameters to zero; a subclass makes one mistake."""

    def __init__(self, weight: float, inserted: Inserted) -> None:
        self.weight = weight
        self.parameters = [p for key, group in inserted.groups().items() if key != "head" for p in group]

    def add(self, state: StepState) -> Tensor | None:
        """The sum of squares."""
        if not self.weight or not self.parameters:
            return None
        return self.weight * torch.stack([p.square().sum() for p in self.parameters]).sum()

    def adjust(self, state: StepState) -> None:
        """Nothing."""

    def state(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Nothing."""


@dataclass(frozen=True, slots=True)
class _Decay:
    """Weight decay of the adapters: keeps every law."""

    weight: float = 0.1

    term: ClassVar[type[_Term]] = _Term

    def begin(self, inserted: Inserted, task: Task, seed: int) -> Term:
        return self.term(self.weight, inserted)


class _NeverTerm(_Term):
    def add(self, state: StepState) -> Tensor | None:
        self.weight = 0.0
        return super().add(state)


class _Never(_Decay):
    """Forgets its weight."""

    term: ClassVar[type[_Term]] = _NeverTerm


class _AlwaysTerm(_Term):
    def add(self, state: StepState) -> Tensor | None:
        self.weight = max(self.weight, 1e-6)
        return super().add(state)


class _Always(_Decay):
    """Divides by its weight, and to do so keeps it away from 0."""

    term: ClassVar[type[_Term]] = _AlwaysTerm


class _LengthTerm(_Term):
    def add(self, state: StepState) -> Tensor | None:
        if not self.weight or not self.parameters:
            return None
        return self.weight * torch.stack([p.square().sum().sqrt() for p in self.parameters]).sum()


class _Length(_Decay):
    """Adds the length instead of its square, which has no gradient at the start."""

    term: ClassVar[type[_Term]] = _LengthTerm


class _QuietTerm(_Term):
    def add(self, state: StepState) -> Tensor | None:
        if self.weight:
            state.inserted.train_mode(False)
        return super().add(state)


class _Quiet(_Decay):
    """Switches the model to evaluation mode for its term and leaves it there."""

    term: ClassVar[type[_Term]] = _QuietTerm


class _CountingTerm(_Term):
    def __init__(self, weight: float, inserted: Inserted) -> None:
        super().__init__(weight, inserted)
        self.strength = 1.0

    def add(self, state: StepState) -> Tensor | None:
        if state.step == 0:
            self.strength = 1.0 + next(_Counting.begun) / 8
        extra = super().add(state)
        return None if extra is None else extra * self.strength

    def state(self) -> dict[str, Tensor]:
        return {"strength": torch.tensor(self.strength)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self.strength = float(state["strength"])


class _Counting(_Decay):
    """Takes its strength from how often it was ever begun."""

    begun: ClassVar = itertools.count(1)
    term: ClassVar[type[_Term]] = _CountingTerm


class _ForgetfulTerm(_Term):
    seen = 0

    def add(self, state: StepState) -> Tensor | None:
        self.seen += 1
        extra = super().add(state)
        return None if extra is None else extra * self.seen


class _Forgetful(_Decay):
    """Grows with the steps it has seen, and does not save how many."""

    term: ClassVar[type[_Term]] = _ForgetfulTerm


class _Demanding(_Decay):
    """Refuses plans it has nothing to do with."""

    def begin(self, inserted: Inserted, task: Task, seed: int) -> Term:
        if not len(inserted.allocation):
            raise UsageError("there are no adapters")
        return self.term(self.weight, inserted)


BROKEN: Mapping[str, Callable[[], Regulariser]] = {
    "test_a_weight_of_zero_changes_nothing": _Always,
    "test_it_acts": _Never,
    "test_terms_and_gradients_are_finite": _Length,
    "test_model_mode_and_flags_are_left_alone": _Quiet,
    "test_the_same_seed_gives_the_same_terms": _Counting,
    "test_a_restored_term_goes_on_alike": _Forgetful,
    "test_a_plan_without_adapters_trains": _Demanding,
}
"""Law to a regulariser that breaks this law and keeps the others."""
