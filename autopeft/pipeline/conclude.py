"""The end of a search: its winner is found, retrained beside the best baselines, exported and written down."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Any

from autopeft.config.decode import study_from_dict, study_to_dict
from autopeft.core.codec import encode
from autopeft.core.record import Record, Role, Trial
from autopeft.errors import TrainingFailed
from autopeft.models.graph import dataflow
from autopeft.pipeline.costs import own_costs
from autopeft.pipeline.deliver import deliver, with_exports
from autopeft.pipeline.effort import Effort
from autopeft.pipeline.events import Emit, Event
from autopeft.pipeline.facts import budget_facts, data_facts, environment_facts, model_facts, search_facts
from autopeft.pipeline.finish import Finalist, adapter_folder, finish
from autopeft.pipeline.planfile import read_plan
from autopeft.pipeline.playoff import play_off
from autopeft.pipeline.prepare import Prepared
from autopeft.pipeline.publish import publish
from autopeft.pipeline.repack import repack, wants_repacking
from autopeft.pipeline.runner import Runner
from autopeft.pipeline.standings import Standings
from autopeft.pipeline.trials import enter
from autopeft.store.atomic import read_json
from autopeft.store.paths import RunFolder

if TYPE_CHECKING:
    from torch import Tensor

    from autopeft.config.study import Study
    from autopeft.search.optuna_study import OptunaSearcher

__all__ = ["conclude"]

_BASELINES_AT_END = 2


def conclude(
    runner: Runner, study: Study, searcher: OptunaSearcher, run: RunFolder, effort: Effort, started: float, emit: Emit
) -> Record:
    """Retrain the winner and the best baselines, export the winner, write record and report."""
    prepared = runner.prepared
    trials = searcher.finished()
    winner = _winner(runner, study, trials)
    if winner is None:
        reasons = "; ".join(t.outcome.reason for t in trials if t.outcome.reason)
        raise TrainingFailed(f"no plan could be trained: {reasons}")
    if study.search.tier == "search":
        winner = _played_off(runner, study, searcher, winner, run, effort)
    winner, repacking = _repacked(runner, study, searcher, winner, run)
    trials = searcher.finished()
    baselines = _ranked(runner, study, trials, ("baseline",))[:_BASELINES_AT_END]
    finalists = [_finalist(run, study, trial) for trial in (winner, *baselines)]
    if study.search.tier is not None:
        # What was chosen by short trainings is trained in full at the end.
        train = dataclasses.replace(finalists[0].study.train, epochs=effort.epochs, data_fraction=effort.fraction)
        finalists[0] = dataclasses.replace(finalists[0], study=dataclasses.replace(finalists[0].study, train=train))
    emit(Event("stage", f"finish: {', '.join(f.name for f in finalists)}, {study.search.seeds} seeds each"))
    contenders = finish(runner, finalists[0], tuple(finalists[1:]), run.root)
    costs = {**_costs(runner, finalists[0]), **repacking}
    record = Record(
        str(run.root),
        study_to_dict(study),
        model_facts(prepared),
        data_facts(prepared),
        budget_facts(prepared.budget),
        trials,
        winner.number,
        contenders,
        {},
        costs,
        environment_facts(prepared),
        {name: round(value, 3) for name, value in prepared.seconds.items()},
        search_facts(study, trials) | _how(study, searcher, run),
        Standings(run).read(),
    )
    seed = next(o.seed for o in contenders[0].outcomes if o.status == "done")
    adapter = adapter_folder(run.root, finalists[0], seed) / "adapter.safetensors"
    plan = read_plan(run.root / winner.plan)
    exports = deliver(prepared, plan, adapter, record, run.exports, emit=emit)
    record = with_exports(record, exports, run.root)
    record = dataclasses.replace(record, seconds={**record.seconds, "total": round(time.perf_counter() - started, 3)})
    dataflow(prepared.model, prepared.catalog, _example(prepared), run.root / "graph")
    publish(record, run, searcher, prepared)
    return record


def _played_off(
    runner: Runner, study: Study, searcher: OptunaSearcher, winner: Trial, run: RunFolder, effort: Effort
) -> Trial:
    """The winner of the short trials at the learning rate that is best for a whole training."""
    ran = play_off(runner, _finalist(run, study, winner), effort)
    names = {trial.name for trial in searcher.finished() if trial.role == "full"}
    for one, entry in ran:
        if one.name not in names:
            enter(runner, searcher, run, one.name, "full", winner.knobs, one.study, one.allocation, entry.outcome)
    best, entry = ran[0]
    if entry.outcome.status != "done":
        return winner
    return next(t for t in searcher.finished() if t.role == "full" and t.name == best.name)


def _repacked(
    runner: Runner, study: Study, searcher: OptunaSearcher, winner: Trial, run: RunFolder
) -> tuple[Trial, dict[str, float]]:
    """The winner, or the same with another plan from a third of its training on where that is better; and the cost."""
    if not wants_repacking(study):
        return winner, {}
    finalist = _finalist(run, study, winner)
    found = repack(runner, finalist, run.root / "repack")
    runner.emit(Event("stage", f"repacking {winner.name}: {'kept' if found.finalist else 'not kept'}, {found.reason}"))
    costs = {"repacking": float(found.sample_epochs)} if found.sample_epochs else {}
    if found.finalist is None:
        return winner, costs
    second = found.finalist
    known = [t for t in searcher.finished() if t.role == "repacked" and t.digest == second.allocation.digest]
    if not known:
        entry = runner.train(second.study, second.allocation, label=second.name, first=second.first, stage="repacking")
        enter(
            runner,
            searcher,
            run,
            second.name,
            "repacked",
            winner.knobs,
            second.study,
            second.allocation,
            entry.outcome,
            second.first,
        )
        known = [t for t in searcher.finished() if t.role == "repacked" and t.digest == second.allocation.digest]
    return known[-1], costs


def _how(study: Study, searcher: OptunaSearcher, run: RunFolder) -> dict[str, Any]:
    """The tier, the race, the bound on what is left, and where the first settings came from."""
    found: dict[str, Any] = {"tier": study.search.tier}
    if (run.root / "race.json").is_file():
        found["race"] = read_json(run.root / "race.json")
    elif (certificate := searcher.certificate(study.search.confidence)) is not None:
        found["certificate"] = encode(certificate)
    if (run.root / "warm.json").is_file():
        found["warm_start"] = read_json(run.root / "warm.json")["points"]
    return found


def _ranked(runner: Runner, study: Study, trials: tuple[Trial, ...], roles: tuple[Role, ...]) -> list[Trial]:
    """Finished trials of these roles, the best on the outer split first, see `Runner.rank`; ties to the earlier one."""
    done = [t for t in trials if t.role in roles and t.outcome.status == "done"]
    return sorted(done, key=lambda t: (*(-value for value in runner.rank(study, t.outcome)), t.number))


def _winner(runner: Runner, study: Study, trials: tuple[Trial, ...]) -> Trial | None:
    """The plan of ours to take: the first in rank, or what the goals make of a front."""
    ranked = _ranked(runner, study, trials, ("trial", "default"))
    if not ranked:
        return None
    if study.goals.mode != "pareto":
        return ranked[0]
    return ranked[study.goals.choose([study.reward.value(t.outcome) for t in ranked])]


def _finalist(run: RunFolder, study: Study, trial: Trial) -> Finalist:
    plan = read_plan(run.root / trial.plan)
    trained = study_from_dict(plan.study)
    search = dataclasses.replace(trained.search, seeds=study.search.seeds)
    return Finalist(
        trial.name, trial.number, trial.role, dataclasses.replace(trained, search=search), plan.allocation, plan.first
    )


def _costs(runner: Runner, winner: Finalist) -> dict[str, float]:
    """Passes per stage, also of earlier processes of this run, and of one full training for comparison."""
    sizes, train = runner.prepared.task.sizes, winner.study.train
    runner.prepared.scores_for(winner.study)  # An earlier process may have measured its bases.
    trained = runner.ledger.passes()
    return {
        **own_costs(runner.prepared, runner.ledger),
        "baselines": trained.get("baselines", 0.0),
        "finish": trained.get("finish", 0.0),
        "full_training": train.epochs * train.data_fraction * (sizes["inner"] + sizes["outer"]),
    }


def _example(prepared: Prepared) -> Tensor:
    for batch in prepared.task.batches("inner", batch_size=1):
        example: Tensor = batch[0][:1].to(prepared.device)
        return example
    raise TrainingFailed("the inner split is empty")
