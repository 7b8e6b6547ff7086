"""A study as its readers see it: outcomes, totals, the best."""

from __future__ import annotations

import dataclasses

from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from autopeft.core.record import Role, Trial
from autopeft.search._calm import calm
from autopeft.search.entry import as_trial
from autopeft.search.history import counted, finished, is_replaced, place, role_of, with_state

__all__ = ["Board"]


class Board:
    """What a study holds, read anew at each call, whoever wrote it.

    Args:
        study: the study, opened.
        where: the storage, for messages.
    """

    def __init__(self, study: Study, where: str) -> None:
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

    def best(self, *roles: Role) -> Trial | None:
        """The complete trial with the best value, among these roles if any are named; ties go to the earlier one."""
        with calm(self._where):
            maximize = self._study.direction == StudyDirection.MAXIMIZE
            trials = self._trials()
            done = [t for t in finished(trials) if t.state == TrialState.COMPLETE and t.value is not None]
        among = [t for t in done if not roles or role_of(t) in roles]
        if not among:
            return None
        sign = -1.0 if maximize else 1.0
        return self._placed(min(among, key=lambda t: (sign * (t.value or 0.0), t.number)), trials)

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
