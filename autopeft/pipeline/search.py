"""`autopeft search`: from a study to a record."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from autopeft.core.codec import decode, encode
from autopeft.core.record import Record
from autopeft.pipeline.claim import claim, remembered, removed_on_failure, run_token
from autopeft.pipeline.conclude import conclude
from autopeft.pipeline.contenders import Group, all_contenders, contender_names
from autopeft.pipeline.costs import TIERS, full_training
from autopeft.pipeline.effort import Effort, finish_seconds, plan_effort
from autopeft.pipeline.entrants import run_entrants
from autopeft.pipeline.events import Emit, Event, silent
from autopeft.pipeline.facts import environment_facts
from autopeft.pipeline.ledger import Ledger
from autopeft.pipeline.playoff import playoff_cost
from autopeft.pipeline.prepare import Prepared, prepare
from autopeft.pipeline.runner import Runner
from autopeft.pipeline.standings import Standings
from autopeft.pipeline.trials import TrialLoop, open_searcher
from autopeft.pipeline.warm import kept_points
from autopeft.store.atomic import read_json, write_json
from autopeft.store.lock import RunLock
from autopeft.store.paths import RunFolder
from autopeft.training.preempt import preemptible

if TYPE_CHECKING:
    from autopeft.config.study import Study

__all__ = ["run_search"]

_MANY = 10**6
"""Trials of a search that its tier ends."""


def run_search(
    study: Study,
    run: RunFolder,
    *,
    emit: Emit = silent,
    storage: str | None = None,
    study_name: str | None = None,
) -> Record:
    """Run or continue a search in a run folder.

    Baselines are tuned first, then `search.trials` trials are run in all, then the winner and the two best baselines
    are retrained with several seeds, the test split is opened once, and the winner is exported.

    Args:
        study: the resolved study.
        run: the run folder; a folder of the same study is continued.
        emit: what is told.
        storage: Optuna storage URL; SQLite in the run folder when None.
        study_name: name of the Optuna study; the folder's name when None.

    Raises:
        StaleRun: when the folder holds another study.
        RunLocked: when another process works in it.
        InfeasibleBudget: when the budget buys nothing.
        TrainingFailed: when no plan can be trained.
        Preempted: when a signal asked to stop; the same command continues.
    """
    started = time.perf_counter()
    missing = [folder for folder in (run.root, *run.root.absolute().parents) if not folder.exists()]
    run.create()
    with RunLock(run.lock), preemptible():
        with removed_on_failure(missing):
            contender_names(study.search.contenders)
            claim(study, run)
            emit(Event("stage", f"run folder {run.root}"))
            prepared = prepare(study, run.root, {"unseal_token": run_token(run)})
            _announce(prepared, emit)
            standings = Standings(run)
            groups = standings.enter(all_contenders(prepared, study), emit)
            write_json(run.environment, environment_facts(prepared))
            write_json(run.catalog, encode(prepared.catalog))
            effort = _effort(prepared, study, groups, run, time.perf_counter() - started)
            _announce_effort(effort, study, groups, emit)
            storage, study_name = remembered(run, storage, study_name)
            tier = study.search.tier
            short = effort.of_trials(tier)
            searcher = open_searcher(prepared, study, run, short, storage=storage, name=study_name)
        searcher.reap()
        runner = Runner(prepared, Ledger(run.root / "ledger"), emit)
        allowance = None if tier is None else TIERS[tier] * full_training(prepared, effort)
        left = allowance
        if allowance is not None and tier == "search":
            left = allowance - playoff_cost(prepared, effort)
        run_entrants(runner, study, groups, effort, searcher, run, standings, left)
        deadline = None
        if study.search.time_limit is not None:
            deadline = started + study.search.time_limit - finish_seconds(prepared, study, effort) / 0.9
        total = study.search.trials
        if tier is not None:
            total = _MANY if tier == "search" else 0
        points = kept_points(
            run.root / "warm.json", study.search.warm_start, prepared.catalog.fingerprint, study.goals, searcher.space
        )
        TrialLoop(runner, study, searcher, short, run, points).until(total, deadline, allowance=left)
        return conclude(runner, study, searcher, run, effort, started, emit)


def _announce(prepared: Prepared, emit: Emit) -> None:
    study, task = prepared.study, prepared.task
    sizes = ", ".join(f"{name} {n:,}" for name, n in task.sizes.items())
    emit(Event("stage", f"model {prepared.loaded.name}: {prepared.catalog.n_base:,} base parameters"))
    emit(Event("stage", f"data {study.data.spec}: {len(task.classes)} classes, {sizes}"))
    head = f"the head's {prepared.catalog.n_head:,} are trained and not counted"
    emit(Event("stage", f"budget {prepared.budget}; {head if prepared.catalog.head else 'the model has no head'}"))
    if prepared.probe is not None:
        emit(Event("stage", f"head warmed up: ridge probe, cross-validated accuracy {prepared.probe.cv_accuracy:.3f}"))


def _announce_effort(effort: Effort, study: Study, groups: tuple[Group, ...], emit: Emit) -> None:
    text = f"{len(groups)} contenders, {study.search.trials} trials, {effort.epochs} epochs each"
    if effort.fraction < 1:
        text += f" of {effort.fraction:.0%} of the data"
    if effort.planned_seconds:
        text += f", {effort.planned_seconds:.0f} s planned"
    emit(Event("stage", text))


def _effort(prepared: Prepared, study: Study, groups: tuple[Group, ...], run: RunFolder, spent: float) -> Effort:
    """Planned once per run and kept, so that a continued run trains as long as before."""
    path = run.root / "effort.json"
    if path.is_file():
        return decode(Effort, read_json(path), str(path))
    effort = plan_effort(prepared, study, groups, spent)
    write_json(path, encode(effort))
    return effort
