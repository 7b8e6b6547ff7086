"""A study as its readers see it: outcomes, totals, the best."""

from __future__ import annotations

import dataclasses

import numpy as np
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from autopeft.core.goals import Goals
from autopeft.core.record import Role, Trial
from autopeft.core.space import Space
from autopeft.search._calm import calm
from autopeft.search.certificate import Certificate, certify, coordinates
from autopeft.search.entry import as_trial
from autopeft.search.history import counted, finished, is_replaced, place, role_of, with_state

__all__ = ["Board"]

_LEAST = 3
"""Values below which nothing can be bounded."""


class Board:
    """What a study holds, read anew at each call, whoever wrote it.

    Args:
        study: the study, opened.
        where: the storage, for messages.
        goals: what is searched for.
        space: the knobs.
    """

    def __init__(self, study: Study, where: str, goals: Goals, space: Space) -> None:
        self._goals = goals
        self._space = space
        self._study = study
        self._where = where

    @property
    def name(self) -> str:
        """Name of the study."""
        return self._study.study_name

    @property
    def study(self) -> Study:
        """The Optuna study itself, for dashboards."""
        return self._study

    def finished(self) -> tuple[Trial, ...]:
        """Every trial with an outcome, numbered by its place; those that were asked again are left out."""
        with calm(self._where):
            trials = self._trials()
        return tuple(sorted((self._placed(t, trials) for t in finished(trials)), key=lambda t: t.number))

    def place(self, number: int) -> int:
        """Place of a trial of the study in the record, see `autopeft.search.history.place`."""
        with calm(self._where):
            trials = self._trials()
        return place(next(t for t in trials if t.number == number), trials)

    @property
    def goals(self) -> Goals:
        """What is searched for."""
        return self._goals

    def best(self, *roles: Role) -> Trial | None:
        """The complete trial to take, among these roles or all but `reference`, see `Goals.choose`."""
        with calm(self._where):
            trials = self._trials()
            done = [t for t in finished(trials) if t.state == TrialState.COMPLETE]
        found = [as_trial(t) for t in done if (role_of(t) in roles if roles else role_of(t) != "reference")]
        known = [t for t in found if len(t.rewards) == len(self._goals.names)]
        if not known:
            return None
        chosen = known[self._goals.choose([t.rewards for t in known])]
        return self._placed(self._frozen(chosen.number), trials)

    def find(self, key: str) -> Trial | None:
        """The complete trial with this equality key, None without one."""
        with calm(self._where):
            trials = self._trials()
        twins = (t for t in trials if t.state == TrialState.COMPLETE and t.user_attrs.get("key") == key)
        return next((self._placed(t, trials) for t in twins), None)

    def count(self) -> int:
        """Searched trials that are complete, pruned or failed, whoever ran them; baselines do not count."""
        with calm(self._where):
            return len(counted(self._trials()))

    def begun(self) -> int:
        """Searched trials that were begun, whatever came of them; one asked again after a crash counts once."""
        with calm(self._where):
            trials = self._trials()
        return sum(1 for t in trials if role_of(t) == "trial" and not is_replaced(t) and t.state != TrialState.WAITING)

    def certificate(self, confidence: float) -> Certificate | None:
        """How much better than the best trial of ours a knob setting could still be, see `autopeft.search.certificate`.

        It rests on the complete trials within the budget, whose first goal it is about; None for fewer than three, on
        the way to a front, or when the best is not known by its knobs.
        """
        if self._goals.mode == "pareto":
            return None
        with calm(self._where):
            done = [t for t in finished(self._trials()) if t.state == TrialState.COMPLETE and t.values]
        known = [t for t in done if role_of(t) not in ("reference", "full", "repacked")]
        rows = [t for t in known if all(knob.path in t.params for knob in self._space)]
        kept = [t for t in rows if not any(v > 0 for v in t.constraints.values())]
        sign = 1.0 if self._goals.directions[0] == "maximize" else -1.0
        ours = [i for i, t in enumerate(kept) if role_of(t) in ("trial", "default")]
        if len(kept) < _LEAST or not ours:
            return None
        points = np.stack([coordinates(self._space, t.params) for t in kept])
        values = [sign * (t.values or [0.0])[0] for t in kept]
        return certify(points, values, max(ours, key=lambda i: (values[i], -i)), confidence)

    def states(self) -> dict[str, int]:
        """How many searched trials are `complete`, `pruned`, `failed`, `running` and `waiting`."""
        with calm(self._where):
            trials = [t for t in self._trials() if role_of(t) == "trial" and not is_replaced(t)]
        return {
            "failed" if state == TrialState.FAIL else state.name.lower(): len(with_state(trials, state))
            for state in TrialState
        }

    def remaining(self, total: int) -> int:
        """Trials to begin until the study has `total`; those that run count as done, those that wait do not."""
        with calm(self._where):
            trials = self._trials()
        running = [t for t in with_state(trials, TrialState.RUNNING) if role_of(t) == "trial"]
        return max(0, total - len(counted(trials)) - len(running))

    @staticmethod
    def _placed(trial: FrozenTrial, trials: list[FrozenTrial]) -> Trial:
        return dataclasses.replace(as_trial(trial), number=place(trial, trials))

    def _frozen(self, number: int) -> FrozenTrial:
        return next(t for t in self._trials() if t.number == number)

    def _trials(self) -> list[FrozenTrial]:
        return sorted(self._study.get_trials(deepcopy=False), key=lambda t: t.number)
