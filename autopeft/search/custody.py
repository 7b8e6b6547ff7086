"""The trials that one searcher runs, and the leases that say so."""

from __future__ import annotations

import secrets
import time

from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import Trial

from autopeft.errors import UsageError
from autopeft.search._calm import calm
from autopeft.search.liveness import Heart, Holder

__all__ = ["Custody"]

_BEAT_SECONDS = 15.0


class Custody:
    """Running trials by number; while there are any, a thread renews their leases.

    Args:
        where: the storage, for messages.
        study: name of the study.
        seconds: time between two beats of the thread.
    """

    def __init__(self, where: str, study: str, seconds: float = 30.0) -> None:
        self.holder = Holder(secrets.token_hex(8), f"{where} {study}")
        self._where = where
        self._trials: dict[int, Trial] = {}
        self._beaten: dict[int, float] = {}
        self._steps: dict[int, set[int]] = {}
        self._heart = Heart(self.beat_all, seconds)

    def __contains__(self, number: object) -> bool:
        return number in self._trials

    def __getitem__(self, number: int) -> Trial:
        if number not in self._trials:
            raise UsageError(f"trial {number} is not one that this searcher asked and that still runs")
        return self._trials[number]

    def take(self, trial: Trial) -> None:
        """Hold a trial that runs from now on; one that came without a lease gets it now."""
        self._trials[trial.number] = trial
        self.holder.numbers.add(trial.number)
        self._beaten[trial.number] = time.monotonic()
        if trial.user_attrs.get("lease", {}).get("holder") != self.holder.token:
            trial.set_user_attr("lease", self.holder.lease())
        self._heart.start()

    def first_report(self, number: int, step: int) -> bool:
        """Whether a trial reports this step for the first time; Optuna warns at the second."""
        known = self._steps.setdefault(number, set())
        new = step not in known
        known.add(step)
        return new

    def drop(self, number: int) -> None:
        """A trial that runs no longer."""
        self._trials.pop(number, None)
        self._beaten.pop(number, None)
        self._steps.pop(number, None)
        self.holder.numbers.discard(number)
        if not self._trials:
            self._heart.stop()

    def beat(self, number: int) -> None:
        """Renew a lease, unless that was a moment ago or others have given the trial up."""
        if time.monotonic() - self._beaten.get(number, 0.0) < _BEAT_SECONDS:
            return
        try:
            with calm(self._where):
                self[number].set_user_attr("lease", self.holder.lease())
        except UpdateFinishedTrialError:
            return
        self._beaten[number] = time.monotonic()

    def beat_all(self) -> None:
        """Renew every lease."""
        for number in tuple(self._trials):
            self.beat(number)
