"""The tree-structured Parzen estimator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from autopeft.errors import UsageError

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler
    from optuna.study import StudyDirection
    from optuna.trial import FrozenTrial

__all__ = ["TPE"]


@dataclass(frozen=True, slots=True)
class TPE:
    """Joint TPE (Bergstra et al., 2011; Watanabe, 2023), with the multi-objective one (Ozaki et al., 2022) on a front.

    Learns from trials that were stopped at a rung, and keeps away from what broke a limit: the sampler for Hyperband.

    Attributes:
        startup: trials, baselines included, before which knobs are drawn at random.

    Raises:
        UsageError: for less than one.
    """

    startup: int = 10

    prunes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.startup < 1:
            raise UsageError(f"startup of the sampler tpe must be at least 1, got {self.startup}")

    def make(self, seed: int) -> BaseSampler:
        """A fresh estimator."""
        from optuna.samplers import TPESampler

        return TPESampler(seed=seed, multivariate=True, n_startup_trials=self.startup)

    def view(self, trials: Sequence[FrozenTrial], directions: Sequence[StudyDirection]) -> list[FrozenTrial]:
        """Every trial; those that failed count among the bad ones instead of being forgotten."""
        from optuna.trial import TrialState

        from autopeft.search._bad import stopped, worst

        if len(directions) > 1:
            return worst(trials, directions)
        return [stopped(t) if t.state == TrialState.FAIL else t for t in trials]
