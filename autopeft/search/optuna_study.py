"""The outer loop on an Optuna study: asks, reports and tells, from any number of processes."""

from __future__ import annotations

import logging
import math
import secrets
from collections.abc import Mapping
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.study import Study, StudyDirection
from optuna.trial import TrialState, create_trial

from autopeft.core.codec import encode
from autopeft.core.contracts import Sampler
from autopeft.core.goals import Goals
from autopeft.core.outcome import Outcome
from autopeft.core.record import Role, Trial
from autopeft.core.space import Space, Value
from autopeft.errors import UsageError
from autopeft.search._calm import calm
from autopeft.search.board import Board
from autopeft.search.custody import Custody
from autopeft.search.entry import attributes
from autopeft.search.fidelity import Rungs
from autopeft.search.history import role_of, with_state
from autopeft.search.knobs import complete_values, suggest_all
from autopeft.search.listing import read_payload
from autopeft.search.liveness import give_up, is_alive
from autopeft.search.opening import open_study
from autopeft.search.pruner import RungPruner
from autopeft.search.sampler import HistorySampler
from autopeft.search.suggested import Suggested
from autopeft.search.tpe import TPE
from autopeft.store.storage import masked_url

__all__ = ["OptunaSearcher", "Suggested", "read_payload"]

_log = logging.getLogger(__name__)

_STATES = {"pruned": TrialState.PRUNED, "failed": TrialState.FAIL}


class OptunaSearcher(Board):
    """A searcher whose memory is an Optuna study; open it with `OptunaSearcher.open`.

    One process with the same seed and history asks the same next trial, also after it was killed and the study
    reopened. Further processes join by opening the same study. All methods may be called while other processes work.

    Args:
        study: the study, opened.
        space: the knobs.
        sampler: the study's sampler.
        where: the storage, for messages.
        goals: what is searched for.
        prunes: whether the sampler bears that trials are stopped at rungs.
    """

    def __init__(
        self, study: Study, space: Space, sampler: HistorySampler, where: str, goals: Goals, *, prunes: bool = True
    ) -> None:
        super().__init__(study, where, goals, space)
        self._prunes = prunes and len(goals.searched) == 1
        self._sampler = sampler
        self._custody = Custody(where, study.study_name)

    @classmethod
    def open(
        cls,
        url: str,
        name: str,
        space: Space,
        *,
        seed: int,
        goals: Goals,
        max_epochs: int,
        sampler: Sampler | None = None,
        identity: Mapping[str, Any] | None = None,
        facts: Mapping[str, Any] | None = None,
        payload: Mapping[str, Any] | None = None,
        eta: int = 3,
        min_epochs: int = 1,
    ) -> OptunaSearcher:
        """Open a study, or begin it.

        Args:
            url: URL of an Optuna storage.
            name: name of the study in it.
            space: the knobs.
            seed: the study's seed.
            goals: what is searched for.
            max_epochs: epochs of a trial that is not stopped.
            sampler: proposes; TPE when None.
            identity: plain data that must be equal for a process to join; space, goals, sampler and rungs are added.
            facts: what the dashboard shows of the study.
            payload: plain data for workers, see `read_payload`.
            eta: one in `eta` trials passes a rung.
            min_epochs: no trial is stopped before.

        Raises:
            StaleRun: when the study was begun with another identity, naming what differs.
            StoreError: when the storage cannot be used.
        """
        chosen = TPE() if sampler is None else sampler
        rungs = Rungs(max_epochs, eta, min_epochs)
        own = {
            "space": encode(space),
            "goals": encode(goals),
            "sampler": {"type": type(chosen).__name__, **encode(chosen)},
            "rungs": encode(rungs),
            "seed": seed,
        }
        asked, where = HistorySampler(space, seed, chosen), masked_url(url)
        study = open_study(
            url,
            name,
            [StudyDirection[direction.upper()] for direction in goals.searched],
            asked,
            RungPruner(rungs),
            identity={**(identity or {}), "search": own},
            facts=facts or {},
            payload=payload,
            metrics=goals.names[: len(goals.searched)],
        )
        return cls(study, space, asked, where, goals, prunes=chosen.prunes)

    @property
    def space(self) -> Space:
        """The knobs."""
        return self._space

    def ask(self, fixed: Mapping[str, Value] | None = None, role: Role = "trial") -> Suggested:
        """The next trial: one that a dead process left behind, or a new one.

        Args:
            fixed: knobs that are not searched. With them a new trial is made, whatever waits.
            role: `trial` is searched, stopped at rungs and counted; a `baseline` and the `default` plan are none of
                these, and knobs that are not fixed take their default.

        Raises:
            UnknownKey: for a knob that the space does not have.
            UsageError: for a value outside of its knob's range.
        """
        pins = dict(fixed or {})
        self._space.check(pins)
        if role != "trial":
            pins = complete_values(self._space, pins)
        with calm(self._where):
            waiting = not pins and role == "trial" and with_state(self._trials(), TrialState.WAITING)
            trial = self._study.ask() if waiting else self._create(role)
            self._custody.take(trial)
            values = self._suggest(trial, pins)
        attrs = trial.user_attrs
        return Suggested(trial.number, values, attrs.get("origin", trial.number), attrs.get("attempt", 1))

    def report(self, number: int, step: int, value: float) -> bool:
        """Keep the value after an epoch; True when the trial should stop.

        Baselines are never stopped, and neither is anything on the way to a front: Optuna keeps no values of single
        epochs there, and one goal alone must not judge. An epoch that was reported before is not kept again.

        Args:
            number: a trial that this searcher asked.
            step: epochs done, from 1.
            value: the search metric.
        """
        trial = self._custody[number]
        if not math.isfinite(value):
            return trial.user_attrs.get("role") == "trial"
        if len(self._goals.searched) > 1:
            return False
        try:
            with calm(self._where):
                if self._custody.first_report(number, step):
                    trial.report(value, step)
                return self._prunes and trial.should_prune()
        except UpdateFinishedTrialError:
            return True

    def tell(self, number: int, outcome: Outcome, rewards: tuple[float, ...] = ()) -> None:
        """Finish a trial.

        A trial that others gave up, because this process seemed dead, stays as they left it.

        Args:
            number: a trial that this searcher asked.
            outcome: what came of it.
            rewards: one number per goal; empty unless the outcome is done. What breaks a limit is kept as a constraint,
                which samplers that know constraints learn from.

        Raises:
            UsageError: when rewards and status do not fit, or a reward is not finite.
        """
        trial = self._custody[number]
        if (outcome.status == "done") != bool(rewards):
            raise UsageError(f"trial {number} is {outcome.status} and has {len(rewards)} rewards")
        if rewards and len(rewards) != len(self._goals.names):
            raise UsageError(f"trial {number} has {len(rewards)} rewards, the goals are {', '.join(self._goals.names)}")
        if not all(math.isfinite(r) for r in rewards):
            raise UsageError(f"the rewards of trial {number} must be finite, got {rewards}")
        try:
            with calm(self._where):
                if outcome.reason:
                    trial.set_user_attr("reason", outcome.reason)
                if len(rewards) > 1:
                    trial.set_user_attr("rewards", list(rewards))
                if outcome.status == "done":
                    self._give_way(trial)
                    for name, excess in self._goals.violations(rewards).items():
                        trial.set_constraint(name, excess)
                    self._study.tell(number, list(rewards[: len(self._goals.searched)]))
                else:
                    self._study.tell(number, state=_STATES[outcome.status])
        except (UpdateFinishedTrialError, ValueError) as error:
            _log.warning("trial %d was given up by another process before it was told: %s", number, error)
        finally:
            self._custody.drop(number)

    def next_number(self) -> int:
        """Reserve the number of a baseline that `add_finished` will fill in; it is given up when this process dies."""
        with calm(self._where):
            trial = self._create("baseline")
            self._custody.take(trial)
        return trial.number

    def add_finished(self, trial: Trial) -> int:
        """Add a trial that was run elsewhere, with all knobs of the space.

        Args:
            trial: the trial; its number is one that `next_number` reserved, or is ignored.

        Returns:
            The number it has in the study.
        """
        values = complete_values(self._space, trial.knobs)
        number = trial.number if trial.number in self._custody else self.next_number()
        with calm(self._where):
            running = self._custody[number]
            running.set_user_attr("role", trial.role)
            self._suggest(running, values)
            for epoch, value in trial.outcome.curve if len(self._goals.searched) == 1 else ():
                if math.isfinite(value):
                    running.report(value, epoch)
        self.describe(trial, number)
        self.tell(number, trial.outcome, trial.rewards)
        return number

    def describe(self, trial: Trial, number: int | None = None) -> None:
        """Keep the whole of a trial with it; call it before `tell`."""
        running = self._custody[trial.number if number is None else number]
        try:
            with calm(self._where):
                for key, value in attributes(trial).items():
                    running.set_user_attr(key, value)
        except UpdateFinishedTrialError:
            _log.warning("trial %d was given up by another process before it was described", trial.number)

    def claim_key(self, number: int, key: str) -> Trial | None:
        """Say what a running trial is, see `autopeft.search.equality`.

        Args:
            number: a trial that this searcher asked.
            key: its equality key.

        Returns:
            The complete trial that is the same training: tell its outcome instead of training again. None when there
            is none; the key is then this trial's.
        """
        twin = self.find(key)
        with calm(self._where):
            if twin is None:
                self._custody[number].set_user_attr("key", key)
            else:
                self._custody[number].set_user_attr("same_as", twin.number)
        return twin

    def others_running(self) -> bool:
        """Whether a searched trial runs that this searcher did not ask, as far as `reap` has found out."""
        with calm(self._where):
            running = with_state(self._trials(), TrialState.RUNNING)
        return any(role_of(t) == "trial" and t.number not in self._custody for t in running)

    def reap(self) -> tuple[int, ...]:
        """Give up the running trials of dead processes, and queue them again with the same knobs.

        Works on every storage; Optuna's heartbeat is not relied upon. A trial that outlived its process three times is
        failed for good, and baselines are not queued again: whoever runs them finds them missing.

        Returns:
            Numbers of the trials that were given up.
        """
        with calm(self._where):
            running = with_state(self._trials(), TrialState.RUNNING)
            dead = [t for t in running if t.number not in self._custody and not is_alive(t)]
            return tuple(t.number for t in dead if give_up(self._study, t))

    def abandon(self, number: int) -> None:
        """Give up a trial of this searcher and queue it again: when a signal asks this process to stop."""
        self._custody[number]  # refuses a trial that is not ours
        with calm(self._where):
            give_up(self._study, self._frozen(number))
        self._custody.drop(number)

    def beat(self, number: int) -> None:
        """Renew the lease of a trial; a thread does so too, every half minute."""
        self._custody.beat(number)

    def note(self, text: str) -> None:
        """Show a note (Markdown) on the study's page of the dashboard; a failure is logged and nothing else."""
        try:
            from optuna_dashboard import save_note

            with calm(self._where):
                save_note(self._study, text)
        except Exception as error:  # noqa: BLE001 - a page for people must never end a search
            _log.warning("the note for the dashboard could not be written: %s", error)

    def _create(self, role: Role) -> optuna.Trial:
        """A new running trial, with its lease from the first moment on."""
        token = secrets.token_hex(8)
        attrs = {"role": role, "lease": self._custody.holder.lease(), "created": token}
        self._study.add_trial(create_trial(state=TrialState.RUNNING, user_attrs=attrs))
        created = next(t for t in reversed(self._trials()) if t.user_attrs.get("created") == token)
        return optuna.Trial(self._study, created._trial_id)  # Optuna gives no public id to a trial added this way

    def _give_way(self, trial: optuna.Trial) -> None:
        """Leave the equality key to a trial that became complete with it while this one ran."""
        key = trial.user_attrs.get("key")
        twin = self.find(key) if key else None
        if twin is not None:
            trial.set_user_attr("key", "")
            trial.set_user_attr("same_as", twin.number)

    def _suggest(self, trial: optuna.Trial, pins: Mapping[str, Value]) -> dict[str, Value]:
        self._sampler.pins = dict(pins)
        try:
            return suggest_all(trial, self._space)
        finally:
            self._sampler.pins = {}
