"""The trials of a search: ask, plan, train, tell."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autopeft.config.decode import study_to_dict
from autopeft.config.spaces import load_space
from autopeft.core.allocation import Allocation
from autopeft.core.outcome import Outcome
from autopeft.core.record import Role, Trial
from autopeft.errors import InfeasibleBudget, Preempted
from autopeft.pipeline.costs import fixed_costs, run_cost, trained_costs
from autopeft.pipeline.effort import Effort
from autopeft.pipeline.events import Event
from autopeft.pipeline.knobs import apply_knobs, relevant_space
from autopeft.pipeline.phases import FirstPhase
from autopeft.pipeline.plan import make_plan
from autopeft.pipeline.planfile import write_plan
from autopeft.pipeline.planning import as_plan
from autopeft.pipeline.warm import WarmPoint
from autopeft.search.optuna_study import OptunaSearcher, Suggested
from autopeft.store.paths import RunFolder
from autopeft.store.storage import default_url, masked_url

if TYPE_CHECKING:
    from autopeft.config.study import Study
    from autopeft.pipeline.prepare import Prepared
    from autopeft.pipeline.runner import Runner

__all__ = ["TrialLoop", "enter", "make_trial", "open_searcher", "study_identity"]

_POLL_SECONDS = 1.0

_LEAST_BEFORE_STOP = 5
"""Searched trials before the rule of `search.stop_delta` is asked."""


def open_searcher(
    prepared: Prepared,
    study: Study,
    run: RunFolder,
    effort: Effort,
    *,
    storage: str | None = None,
    name: str | None = None,
) -> OptunaSearcher:
    """Open or create the Optuna study of a run, with what a worker needs to join it.

    Raises:
        StaleRun: when a study of this name belongs to other settings.
        StoreError: when the storage cannot be used.
    """
    url = storage or default_url(run.database)
    return OptunaSearcher.open(
        url,
        name or run.root.resolve().name,
        relevant_space(load_space(study.search.space), study),
        seed=study.seed,
        goals=study.goals,
        sampler=study.search.sampler,
        max_epochs=effort.epochs,
        identity={
            "catalog": prepared.catalog.fingerprint,
            "data": prepared.task.data_hash,
            "study": study_identity(study),
        },
        facts={
            "model": prepared.loaded.name,
            "data": study.data.spec,
            "budget": str(prepared.budget),
            "storage": masked_url(url),
        },
        payload={"study": study_to_dict(study), "effort": dataclasses.asdict(effort), "run": str(run.root.resolve())},
    )


def study_identity(study: Study) -> dict[str, Any]:
    """What may not differ between two calls or two processes of one study.

    The number of trials, the time limit, the rule to stop and the device may.
    """
    data = study_to_dict(study)
    data.pop("device", None)
    data["search"] = {k: v for k, v in data["search"].items() if k not in ("trials", "time_limit", "stop_delta")}
    return data


class TrialLoop:
    """Runs trials of one study in this process.

    Args:
        runner: trains through the ledger.
        study: the study without any knob set.
        searcher: asks and is told.
        effort: full fidelity in epochs.
        run: the run folder.
        warm: knob settings of earlier runs, tried first.
    """

    def __init__(
        self,
        runner: Runner,
        study: Study,
        searcher: OptunaSearcher,
        effort: Effort,
        run: RunFolder,
        warm: Sequence[WarmPoint] = (),
    ) -> None:
        self._warm = tuple(warm)
        self._fixed: float | None = None
        self._runner = runner
        self._study = study
        self._searcher = searcher
        self._effort = effort
        self._run = run

    def until(
        self, total: int, deadline: float | None = None, most: int | None = None, allowance: float | None = None
    ) -> int:
        """Run trials until the study has `total` that are complete, pruned or failed, whoever ran them.

        Trials of dead processes are asked again first. When other processes still run the last ones, this waits.

        Args:
            total: trials in all, baselines not counted.
            deadline: `time.perf_counter()` after which no trial is started.
            most: trials that this process runs at most.
            allowance: passes that the whole search of this run folder may cost, see `autopeft.pipeline.costs`; no trial
                is started that could exceed it.

        Returns:
            Trials that this process ran.
        """
        done = 0
        while most is None or done < most:
            self._searcher.reap()
            if deadline is not None and time.perf_counter() > deadline and done:
                self._emit("stage", f"time limit: {self._searcher.count()} of {total} trials")
                break
            if allowance is not None and not self._affordable(allowance):
                self._emit("stage", f"the tier's cost is reached: {self._searcher.count()} trials")
                break
            if self._certified():
                break
            left = self._searcher.remaining(total)
            if left <= 0:
                if not self._searcher.others_running():
                    break
                time.sleep(_POLL_SECONDS)
                continue
            self._one(total)
            done += 1
        return done

    def _affordable(self, allowance: float) -> bool:
        if self._fixed is None:
            self._fixed = sum(fixed_costs(self._runner.prepared).values())
        spent = self._fixed + sum(trained_costs(self._runner.ledger).values())
        watched = self._effort.epochs + 1
        price = run_cost(self._runner.prepared, self._effort.epochs, self._effort.fraction, watched)
        return spent + price <= allowance

    def _certified(self) -> bool:
        """Whether the search may end because no knob setting is likely better by more than the study's delta."""
        search = self._study.search
        if search.stop_delta is None or self._searcher.begun() < max(_LEAST_BEFORE_STOP, len(self._warm)):
            return False
        found = self._searcher.certificate(search.confidence)
        if found is None or found.delta > search.stop_delta:
            return False
        self._emit(
            "stage",
            f"stopped: with {found.confidence:.0%} confidence no setting is better by more than {found.delta:.4g}",
        )
        return True

    def _ask(self) -> Suggested:
        """The next trial; the settings of earlier runs come first, what a dead process left behind before them."""
        begun = self._searcher.begun()
        if begun < len(self._warm) and not self._searcher.states()["waiting"]:
            return self._searcher.ask(self._warm[begun].values)
        return self._searcher.ask()

    def _one(self, total: int) -> None:
        suggestion = self._ask()
        number, place = suggestion.number, self._searcher.place(suggestion.number)
        label, plan = f"trial {place}", self._run.plan(place)
        self._runner.emit(Event("progress", label, self._searcher.count(), total))
        study = apply_knobs(self._study, suggestion.values)
        study = dataclasses.replace(
            study,
            train=dataclasses.replace(study.train, epochs=self._effort.epochs, data_fraction=self._effort.fraction),
        )
        try:
            allocation = make_plan(self._runner.prepared, study)
        except InfeasibleBudget as error:
            outcome = Outcome("failed", seed=study.seed, reason=str(error))
            self._searcher.tell(number, outcome, ())
            return
        write_plan(as_plan(self._runner.prepared, study, allocation), plan)
        judged = getattr(study.reward, "watched", study.reward.names[0]) is not None

        def on_epoch(epoch: int, value: float) -> bool:
            self._searcher.beat(number)
            # Where nothing that is measured on the way stands for the goal, nothing is stopped.
            return judged and self._searcher.report(number, epoch, value)

        try:
            entry = self._runner.train(
                study,
                allocation,
                label=label,
                folder=self._run.trial(place),
                watch="outer",
                on_epoch=on_epoch,
                stage="search",
            )
        except Preempted:
            # Other hosts need not wait until this process counts as dead.
            self._searcher.abandon(number)
            raise
        twin = self._searcher.claim_key(number, entry.key) if entry.outcome.status == "done" else None
        if twin is not None:
            self._emit("result", f"{label} is the same training as trial {twin.number}")
        rewards = study.reward.value(entry.outcome) if entry.outcome.status == "done" else ()
        trial = make_trial(
            self._runner.prepared,
            self._run.root,
            number,
            label,
            "trial",
            suggestion.values,
            study,
            allocation,
            entry.outcome,
            rewards,
            plan,
        )
        self._searcher.describe(trial)
        self._searcher.tell(number, entry.outcome, rewards)

    def _emit(self, kind: Any, text: str) -> None:
        self._runner.emit(Event(kind, text))


def make_trial(
    prepared: Prepared,
    root: Path,
    number: int,
    name: str,
    role: Role,
    values: Mapping[str, Any],
    study: Study,
    allocation: Allocation,
    outcome: Outcome,
    rewards: tuple[float, ...],
    plan: Path,
) -> Trial:
    """One trial as the record keeps it."""
    mix: dict[str, int] = {}
    for option in allocation.options:
        mix[option.method] = mix.get(option.method, 0) + option.cost.trainable
    epochs = outcome.curve[-1][0] if outcome.status == "pruned" and outcome.curve else study.train.epochs
    return Trial(
        number,
        name,
        role,
        dict(values),
        allocation.digest,
        allocation.spent,
        mix,
        outcome,
        rewards,
        round(epochs * study.train.data_fraction * prepared.task.sizes["inner"]),
        str(plan.relative_to(root)),
    )


def enter(
    runner: Runner,
    searcher: OptunaSearcher,
    run: RunFolder,
    name: str,
    role: Role,
    values: Mapping[str, Any],
    study: Study,
    allocation: Allocation,
    outcome: Outcome,
    first: FirstPhase | None = None,
) -> None:
    """Tell the study a training that it did not ask for, and write its plan.

    Args:
        runner: what it was trained by.
        searcher: the study.
        run: the run folder.
        name: what a person calls it.
        role: what it was for.
        values: all knobs of the space.
        study: the settings it was trained under.
        allocation: its plan.
        outcome: what came of it.
        first: what was trained before it.
    """
    rewards = study.reward.value(outcome) if outcome.status == "done" else ()
    number = searcher.next_number()
    plan = run.plan(searcher.place(number))
    write_plan(as_plan(runner.prepared, study, allocation, first=first), plan)
    searcher.add_finished(
        make_trial(runner.prepared, run.root, number, name, role, values, study, allocation, outcome, rewards, plan)
    )
