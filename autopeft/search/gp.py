"""Bayesian optimisation with a Gaussian process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from autopeft.errors import UsageError

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler
    from optuna.study import StudyDirection
    from optuna.trial import FrozenTrial

__all__ = ["GP"]


@dataclass(frozen=True, slots=True)
class GP:
    """Gaussian process with expected improvement (Matern 5/2 with one length per knob; Optuna's `GPSampler`).

    For searches of few, expensive trials. It sees trials at full fidelity only, so nothing is stopped early.

    Attributes:
        startup: trials, baselines included, before which knobs are drawn at random.

    Raises:
        UsageError: for less than one.
    """

    startup: int = 10

    prunes: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.startup < 1:
            raise UsageError(f"startup of the sampler gp must be at least 1, got {self.startup}")

    def make(self, seed: int) -> BaseSampler:
        """A fresh process, fitted anew for each trial."""
        from optuna.samplers import GPSampler

        return GPSampler(seed=seed, n_startup_trials=self.startup, warn_independent_sampling=False)

    def view(self, trials: Sequence[FrozenTrial], directions: Sequence[StudyDirection]) -> list[FrozenTrial]:
        """Every trial; those without a value have the worst one, and those that run keep others away."""
        from autopeft.search._bad import worst

        return worst(trials, directions)
