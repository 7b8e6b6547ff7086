"""The race of a portfolio: short trainings for all, longer ones for those that are not clearly behind."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from autopeft.core.outcome import Outcome
from autopeft.errors import TrainingFailed, UsageError
from autopeft.pipeline.costs import run_cost
from autopeft.pipeline.portfolio import Arm
from autopeft.search.race import keep, seed_deviation

if TYPE_CHECKING:
    from autopeft.pipeline.effort import Effort
    from autopeft.pipeline.ledger import Entry
    from autopeft.pipeline.prepare import Prepared
    from autopeft.pipeline.runner import Runner

__all__ = ["Heat", "Ladder", "plan_race", "race"]

_SHARES = (0.03, 0.09, 0.27)
"""Length of the trainings of each rung, in units of one full training."""

_REPLICATES = 2
"""Candidates that are trained with a second seed on the first rung, to learn how much the seed alone changes."""


@dataclass(frozen=True, slots=True)
class Ladder:
    """What an allowance pays for.

    Attributes:
        arms: candidates that enter.
        replicates: trainings with a second seed on the first rung.
        epochs: length of the trainings of each rung, increasing; each has its own complete schedule.
    """

    arms: int
    replicates: int
    epochs: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Heat:
    """The result of a race.

    Attributes:
        arm: the winner.
        epochs: length of its last training.
        outcome: what came of that.
        facts: rung by rung who ran, how far behind and who was dropped, for the record.
    """

    arm: Arm
    epochs: int
    outcome: Outcome
    facts: dict[str, Any]


def plan_race(prepared: Prepared, effort: Effort, full: float, allowance: float, arms: int) -> Ladder:
    """The widest race that an allowance pays for: all candidates on the first rung, a third on the next, one at last.

    Rungs are 3, 9 and 27 % of a full training, at least one epoch and each longer than the one before. Where that is
    too dear, fewer candidates enter, then there are fewer rungs.

    Args:
        prepared: the task.
        effort: full fidelity.
        full: passes of one full training.
        allowance: passes that may be spent.
        arms: candidates there are.

    Raises:
        UsageError: when not even two candidates can be trained for one epoch each.
    """
    per_epoch = run_cost(prepared, 1, effort.fraction, 0)
    epochs: list[int] = []
    for share in _SHARES:
        epochs.append(max(math.floor(share * full / per_epoch), epochs[-1] + 1 if epochs else 1))
    epochs = [e for e in epochs if e <= effort.epochs]
    for rungs in range(len(epochs), 0, -1):
        prices = [run_cost(prepared, e, effort.fraction) for e in epochs[:rungs]]
        for entering in range(arms, 1, -1):
            for replicates in (_REPLICATES, 0) if rungs == 1 else (_REPLICATES,):
                counts = [entering + replicates, math.ceil(entering / 3), 1][:rungs]
                if sum(n * p for n, p in zip(counts, prices, strict=True)) <= allowance:
                    return Ladder(entering, replicates, tuple(epochs[:rungs]))
    raise UsageError(
        f"a race of two candidates needs {2 * run_cost(prepared, 1, effort.fraction):,.0f} passes and has "
        f"{max(0.0, allowance):,.0f}; train for more epochs (--epochs), or search with --tier search"
    )


def race(runner: Runner, arms: Sequence[Arm], effort: Effort, full: float, allowance: float) -> Heat:
    """Race candidates on the validation loss; see `autopeft.search.race` for who is dropped.

    Args:
        runner: trains through the ledger.
        arms: the candidates, the most promising first.
        effort: full fidelity.
        full: passes of one full training.
        allowance: passes that may be spent.

    Raises:
        TrainingFailed: when no candidate can be trained.
    """
    prepared = runner.prepared
    ladder = plan_race(prepared, effort, full, allowance, len(arms))
    alive = list(arms[: ladder.arms])
    left, sigma, rungs = allowance, 0.0, []
    best: tuple[Arm, Entry] | None = None
    for place, epochs in enumerate(ladder.epochs):
        price = run_cost(prepared, epochs, effort.fraction)
        ran = [(arm, _train(runner, arm, epochs, effort, 0)) for arm in alive]
        left -= price * len(ran)
        done = [(arm, entry) for arm, entry in ran if entry.outcome.status == "done"]
        if not done:
            break
        if place == 0:
            again = [(entry, _train(runner, arm, epochs, effort, 1)) for arm, entry in done[: ladder.replicates]]
            left -= price * len(again)
            sigma = seed_deviation([(a.shards, b.shards) for a, b in again if a.shards and b.outcome.status == "done"])
        later = [run_cost(prepared, e, effort.fraction) for e in ladder.epochs[place + 1 :]]
        # What the next rung can pay for once one training of each later rung is put aside.
        most = 1 if len(later) < 2 else max(1, math.floor((left - sum(later[1:])) / later[0]))
        alive, found = _survivors(runner, done, sigma, most)
        best = next((a, e) for a, e in done if a is alive[0])
        rungs.append(_facts(epochs, ran, found, alive))
    if best is None:
        raise TrainingFailed("no candidate of the race could be trained; lower the learning rates (train.lr_scale)")
    arm, entry = best
    facts = {"sigma_seed": sigma, "replicates": ladder.replicates, "entered": ladder.arms, "rungs": rungs}
    return Heat(arm, rungs[-1]["epochs"], entry.outcome, facts)


def _train(runner: Runner, arm: Arm, epochs: int, effort: Effort, replicate: int) -> Entry:
    train = dataclasses.replace(arm.study.train, epochs=epochs, data_fraction=effort.fraction)
    study = dataclasses.replace(arm.study, train=train)
    label = f"race {arm.name}, {epochs} epoch{'s' if epochs > 1 else ''}" + (", again" if replicate else "")
    return runner.train(study, arm.allocation, label=label, seed=study.seed + replicate, stage="race")


def _survivors(
    runner: Runner, done: list[tuple[Arm, Entry]], sigma: float, most: int
) -> tuple[list[Arm], dict[str, Any]]:
    if all(entry.shards for _, entry in done):
        names, found = keep({a.name: e.shards for a, e in done}, sigma, most, done[0][0].study.search.race_test)
        by_name = {a.name: a for a, _ in done}
        return [by_name[name] for name in names], dict(found)
    # A task without a loss per sample: the reward decides, and nothing is called significant.
    ranked = sorted(done, key=lambda item: runner.rank(item[0].study, item[1].outcome), reverse=True)
    return [arm for arm, _ in ranked[:most]], {}


def _facts(epochs: int, ran: list[tuple[Arm, Entry]], found: dict[str, Any], alive: list[Arm]) -> dict[str, Any]:
    names = {arm.name for arm in alive}
    rows = []
    for arm, entry in ran:
        row: dict[str, Any] = {"name": arm.name, "status": entry.outcome.status, "kept": arm.name in names}
        row |= {"nll": entry.outcome.metrics.get("nll"), "metrics": dict(entry.outcome.metrics)}
        if arm.name in found:
            comparison = found[arm.name]
            row |= {"behind": comparison.difference, "bar": comparison.bar, "worse": comparison.worse}
        rows.append(row)
    return {"epochs": epochs, "arms": rows}
