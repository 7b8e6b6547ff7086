"""Independent draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler
    from optuna.study import StudyDirection
    from optuna.trial import FrozenTrial

__all__ = ["Random"]


@dataclass(frozen=True, slots=True)
class Random:
    """Every knob uniform over its range, on its own scale: the control that a sampler which learns has to beat."""

    prunes: ClassVar[bool] = True

    def make(self, seed: int) -> BaseSampler:
        """A fresh generator."""
        from optuna.samplers import RandomSampler

        return RandomSampler(seed=seed)

    def view(self, trials: Sequence[FrozenTrial], directions: Sequence[StudyDirection]) -> list[FrozenTrial]:
        """Nothing: draws do not depend on what came before."""
        return []
