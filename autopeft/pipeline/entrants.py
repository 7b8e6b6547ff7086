"""The contenders of a search, tuned alike or raced, and told to its study as the first trials."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from autopeft.core.record import Role
from autopeft.pipeline.contenders import Candidate, Group
from autopeft.pipeline.costs import fixed_costs, full_training
from autopeft.pipeline.effort import Effort
from autopeft.pipeline.events import Event
from autopeft.pipeline.knobs import baseline_values
from autopeft.pipeline.portfolio import portfolio
from autopeft.pipeline.race import race
from autopeft.pipeline.runner import Runner
from autopeft.pipeline.standings import Standings
from autopeft.pipeline.trials import enter
from autopeft.pipeline.tune import Tuned, tune, tune_within
from autopeft.store.atomic import write_json
from autopeft.store.paths import RunFolder

if TYPE_CHECKING:
    from autopeft.config.study import Study
    from autopeft.search.optuna_study import OptunaSearcher

__all__ = ["run_entrants"]


def run_entrants(
    runner: Runner,
    study: Study,
    groups: tuple[Group, ...],
    effort: Effort,
    searcher: OptunaSearcher,
    run: RunFolder,
    standings: Standings,
    allowance: float | None,
) -> None:
    """Tune the contenders and tell the study; they are the first trials and do not count in `search.trials`.

    The default plan is tuned by short runs alone in the tiers `default` and `search`, and one candidate of a race in
    the tier `race`.
    """
    known = {trial.name for trial in searcher.finished() if trial.role != "trial"}
    left = None if allowance is None else allowance - sum(fixed_costs(runner.prepared).values())
    for index, group in enumerate(groups):
        runner.emit(Event("progress", f"contender {group.name}", index, len(groups)))
        if any(name == group.name or name in {c.name for c in group.candidates} for name in known):
            continue
        if group.role == "default" and study.search.tier == "race":
            assert left is not None
            _run_race(runner, study, groups, effort, searcher, run, left)
            continue
        if group.role == "default" and study.search.tier is not None:
            assert left is not None
            tuned = tune_within(runner, study, group, effort.of_trials(study.search.tier), left)
        else:
            tuned = tune(runner, study, group, effort)
        standings.tuned(group, tuned, effort.tries or study.search.tries)
        _tell_baseline(runner, searcher, group.role, tuned, run)


def _run_race(
    runner: Runner,
    study: Study,
    groups: tuple[Group, ...],
    effort: Effort,
    searcher: OptunaSearcher,
    run: RunFolder,
    allowance: float,
) -> None:
    """Race the portfolio and tell the study the winner, as a searched trial."""
    if any(trial.role == "trial" for trial in searcher.finished()):
        return
    arms = portfolio(runner.prepared, study, groups)
    heat = race(runner, arms, effort, full_training(runner.prepared, effort), allowance)
    write_json(run.root / "race.json", heat.facts)
    train = dataclasses.replace(heat.arm.study.train, epochs=heat.epochs, data_fraction=effort.fraction)
    trained = dataclasses.replace(heat.arm.study, train=train)
    candidate = Candidate(f"race winner: {heat.arm.name}", heat.arm.allocation)
    _tell_baseline(runner, searcher, "trial", Tuned(candidate, trained, heat.arm.lr_scale, heat.outcome), run)


def _tell_baseline(runner: Runner, searcher: OptunaSearcher, role: Role, tuned: Tuned, run: RunFolder) -> None:
    values = baseline_values(searcher.space, tuned, is_default=role == "default")
    candidate = tuned.candidate
    enter(runner, searcher, run, candidate.name, role, values, tuned.study, candidate.allocation, tuned.outcome)
