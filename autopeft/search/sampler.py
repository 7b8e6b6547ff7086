"""Any sampler of Optuna's as a function of seed and history."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from autopeft.core.contracts import Sampler
from autopeft.core.space import Space, Value
from autopeft.search.history import is_replaced, ordinal, role_of
from autopeft.search.knobs import distributions
from autopeft.training.seeds import derive_seed

__all__ = ["HistorySampler"]


class HistorySampler(BaseSampler):
    """Asks a fresh sampler for every trial.

    The seed is derived from the study's seed and the trial's place in the search, and the sampler is made anew and
    shown the stored trials, so that one worker with the same seed and history is given the same next trial, also after
    it was killed and the study reopened. Two things differ from handing the study to the sampler: the space is the
    declared one, not the intersection of what old trials have; and trials that were replaced after a crash are not
    there.

    Args:
        space: the knobs.
        seed: the study's seed.
        sampler: proposes.
    """

    def __init__(self, space: Space, seed: int, sampler: Sampler) -> None:
        self._distributions = distributions(space)
        self._seed = seed
        self._sampler = sampler
        self.pins: dict[str, Value] = {}

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """All knobs, always."""
        return dict(self._distributions)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Values of all knobs; those in `pins` as they are there."""
        if set(self.pins) >= set(self._distributions):
            return dict(self.pins)
        trials = study.get_trials(deepcopy=False)
        place = ordinal(trial.number, trials)
        # A study of its own, so that the sampler sees exactly the history it should and nothing private is touched.
        mirror = optuna.create_study(
            directions=study.directions, sampler=self._sampler.make(derive_seed(self._seed, "sampler", place))
        )
        mirror.add_trials(self._sampler.view(self._history(trials, trial.number), study.directions))
        return {**mirror.ask(self._distributions).params, **self.pins}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Never needed: every knob is in the joint space."""
        raise NotImplementedError(f"{param_name} is not a knob of the search space")

    def _history(self, trials: Sequence[FrozenTrial], number: int) -> list[FrozenTrial]:
        return [
            t
            for t in trials
            if t.number != number
            and not is_replaced(t)
            # What more than the budget, a longer training or a second phase reaches says nothing about the knobs.
            and role_of(t) not in ("reference", "full", "repacked")
            and self._complete(t.params)
            and t.state != TrialState.WAITING
        ]

    def _complete(self, params: Mapping[str, Any]) -> bool:
        return set(params) >= set(self._distributions)
