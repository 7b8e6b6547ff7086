"""`autopeft search`: from a study to a record."""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autopeft.config.decode import load_study, study_from_dict, study_to_dict, study_to_yaml
from autopeft.core.codec import decode, encode
from autopeft.core.record import Record, Role, Trial
from autopeft.errors import StaleRun, TrainingFailed, UsageError
from autopeft.models.graph import dataflow
from autopeft.pipeline.contenders import Candidate, Group, all_contenders, contender_names
from autopeft.pipeline.costs import TIERS, fixed_costs, full_training, own_costs
from autopeft.pipeline.deliver import deliver, with_exports
from autopeft.pipeline.effort import Effort, finish_seconds, plan_effort
from autopeft.pipeline.events import Emit, Event, silent
from autopeft.pipeline.facts import budget_facts, data_facts, environment_facts, model_facts, search_facts
from autopeft.pipeline.finish import Finalist, adapter_folder, finish
from autopeft.pipeline.knobs import baseline_values
from autopeft.pipeline.ledger import Ledger
from autopeft.pipeline.planfile import read_plan, write_plan
from autopeft.pipeline.planning import as_plan
from autopeft.pipeline.portfolio import portfolio
from autopeft.pipeline.prepare import Prepared, prepare
from autopeft.pipeline.publish import publish
from autopeft.pipeline.race import race
from autopeft.pipeline.repack import repack, wants_repacking
from autopeft.pipeline.runner import Runner
from autopeft.pipeline.standings import Standings
from autopeft.pipeline.trials import TrialLoop, make_trial, open_searcher, study_identity
from autopeft.pipeline.tune import Tuned, tune, tune_within
from autopeft.pipeline.warm import kept_points
from autopeft.store.atomic import read_json, write_json, write_text
from autopeft.store.lock import RunLock
from autopeft.store.paths import RunFolder
from autopeft.store.storage import masked_url
from autopeft.training.preempt import preemptible

if TYPE_CHECKING:
    from torch import Tensor

    from autopeft.config.study import Study
    from autopeft.search.optuna_study import OptunaSearcher

__all__ = ["run_search"]

_BASELINES_AT_END = 2
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
        with _removed_on_failure(missing):
            contender_names(study.search.contenders)
            _claim(study, run)
            emit(Event("stage", f"run folder {run.root}"))
            prepared = prepare(study, run.root, {"unseal_token": _run_token(run)})
            _announce(prepared, emit)
            standings = Standings(run)
            groups = standings.enter(all_contenders(prepared, study), emit)
            write_json(run.environment, environment_facts(prepared))
            write_json(run.catalog, encode(prepared.catalog))
            effort = _effort(prepared, study, groups, run, time.perf_counter() - started)
            _announce_effort(effort, study, groups, emit)
            storage, study_name = _remembered(run, storage, study_name)
            tier = study.search.tier
            short = effort.of_trials(tier)
            searcher = open_searcher(prepared, study, run, short, storage=storage, name=study_name)
        searcher.reap()
        runner = Runner(prepared, Ledger(run.root / "ledger"), emit)
        allowance = None if tier is None else TIERS[tier] * full_training(prepared, effort)
        _run_baselines(runner, study, groups, effort, searcher, run, standings, allowance)
        deadline = None
        if study.search.time_limit is not None:
            deadline = started + study.search.time_limit - finish_seconds(prepared, study, effort) / 0.9
        total = study.search.trials
        if tier is not None:
            total = _MANY if tier == "search" else 0
        points = kept_points(
            run.root / "warm.json", study.search.warm_start, prepared.catalog.fingerprint, study.goals, searcher.space
        )
        TrialLoop(runner, study, searcher, short, run, points).until(total, deadline, allowance=allowance)
        return _finish(runner, study, searcher, run, started, emit)


@contextlib.contextmanager
def _removed_on_failure(missing: Sequence[Path]) -> Iterator[None]:
    """Take a new run folder away again when the run cannot even begin; a folder that was there stays.

    Args:
        missing: the folders that did not exist before, the run folder first.
    """
    try:
        yield
    except BaseException:
        if missing:
            shutil.rmtree(missing[0], ignore_errors=True)
        for folder in missing[1:]:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def _remembered(run: RunFolder, storage: str | None, name: str | None) -> tuple[str | None, str | None]:
    """Storage and study name as given, or as they were when the run began.

    A URL with a password is remembered without it, and has to be given again.

    Raises:
        UsageError: when the URL has to be given again.
    """
    path = run.root / "storage.json"
    if storage is not None:
        write_json(path, {"url": masked_url(storage), "study": name})
        return storage, name
    if not path.is_file():
        return None, name
    known = read_json(path)
    if "***" in known["url"]:
        raise UsageError(
            f"the study of {run.root} lies in {known['url']}, whose password is not kept; "
            f"give --storage URL or set AUTOPEFT_STORAGE"
        )
    return known["url"], name or known["study"]


def _claim(study: Study, run: RunFolder) -> None:
    """Write the study into a new folder, or refuse a folder that holds another one.

    The number of trials, the time limit and the device may change between two calls; nothing else may.
    """
    text = study_to_yaml(study)
    if not run.study.is_file():
        write_text(run.study, text)
        return
    before = load_study([run.study], {})
    differences = _differences(study_identity(before), study_identity(study))
    if differences:
        path, (old, new) = next(iter(differences.items()))
        raise StaleRun(
            f"{run.root} holds another study: {path} was {old!r} and is {new!r} now. "
            f"Choose another --output, or give the same settings to continue"
        )
    write_text(run.study, text)


def _differences(old: Any, new: Any, path: str = "") -> dict[str, tuple[Any, Any]]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        found: dict[str, tuple[Any, Any]] = {}
        for key in sorted(set(old) | set(new)):
            found |= _differences(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
        return found
    return {} if old == new else {path: (old, new)}


def _run_token(run: RunFolder) -> str:
    """A text that is the same whenever this run is continued, and no other run's."""
    path = run.root / "token"
    if not path.is_file():
        write_text(path, secrets.token_hex(16))
    return path.read_text().strip()


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


def _run_baselines(
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
    allocation, outcome = tuned.candidate.allocation, tuned.outcome
    values = baseline_values(searcher.space, tuned, is_default=role == "default")
    rewards = tuned.study.reward.value(outcome) if outcome.status == "done" else ()
    number = searcher.next_number()
    plan = run.plan(searcher.place(number))
    write_plan(as_plan(runner.prepared, tuned.study, allocation), plan)
    searcher.add_finished(
        make_trial(
            runner.prepared,
            run.root,
            number,
            tuned.candidate.name,
            role,
            values,
            tuned.study,
            allocation,
            outcome,
            rewards,
            plan,
        )
    )


def _finish(
    runner: Runner, study: Study, searcher: OptunaSearcher, run: RunFolder, started: float, emit: Emit
) -> Record:
    """Retrain the winner and the best baselines, export the winner, write record and report."""
    prepared = runner.prepared
    trials = searcher.finished()
    winner = _winner(runner, study, trials)
    if winner is None:
        reasons = "; ".join(t.outcome.reason for t in trials if t.outcome.reason)
        raise TrainingFailed(f"no plan could be trained: {reasons}")
    winner, repacking = _repacked(runner, study, searcher, winner, run)
    trials = searcher.finished()
    baselines = _ranked(runner, study, trials, ("baseline",))[:_BASELINES_AT_END]
    finalists = [_finalist(run, study, trial) for trial in (winner, *baselines)]
    if study.search.tier is not None:
        # What was chosen by short trainings is trained in full at the end.
        effort = _effort(prepared, study, (), run, 0.0)
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
        number = searcher.next_number()
        plan = run.plan(searcher.place(number))
        write_plan(as_plan(runner.prepared, second.study, second.allocation, first=second.first), plan)
        rewards = second.study.reward.value(entry.outcome)
        searcher.add_finished(
            make_trial(
                runner.prepared,
                run.root,
                number,
                second.name,
                "repacked",
                winner.knobs,
                second.study,
                second.allocation,
                entry.outcome,
                rewards,
                plan,
            )
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
    """Finished trials of these roles, the best on the outer split first; ties to the earlier one."""
    done = [t for t in trials if t.role in roles and t.outcome.status == "done"]
    return sorted(done, key=lambda t: (*(-value for value in runner.rank(study, t.outcome)), t.number))


def _winner(runner: Runner, study: Study, trials: tuple[Trial, ...]) -> Trial | None:
    """The plan of ours to take: by the goals, ties by the negative log-likelihood, then to the earlier one."""
    ranked = _ranked(runner, study, trials, ("trial", "default"))
    if not ranked:
        return None
    goals = study.goals
    return ranked[goals.choose([study.reward.value(t.outcome) for t in ranked])]


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
