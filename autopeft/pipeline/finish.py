"""The end of a search: the winner and the best baselines retrained with several seeds, the test split opened once."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from autopeft.core.allocation import Allocation
from autopeft.core.outcome import Split
from autopeft.core.record import Contender, Role
from autopeft.errors import TrainingFailed
from autopeft.pipeline.events import Event
from autopeft.pipeline.ledger import Entry
from autopeft.pipeline.phases import FirstPhase

if TYPE_CHECKING:
    from autopeft.config.study import Study
    from autopeft.pipeline.runner import Runner

__all__ = ["Finalist", "adapter_folder", "finish", "paired_interval"]

_TEST: Split = "test"
_DRAWS = 2000


@dataclass(frozen=True)
class Finalist:
    """A plan that is retrained at the end.

    Attributes:
        name: as in the search.
        trial: number of its trial.
        role: `baseline`, `default` or `trial`.
        study: the settings it is trained under.
        allocation: the plan.
        first: what is trained before it.
    """

    name: str
    trial: int
    role: Role
    study: Study
    allocation: Allocation
    first: FirstPhase | None = None


def adapter_folder(run: Path, finalist: Finalist, seed: int) -> Path:
    """Where the retrained adapter of a finalist lies."""
    return run / "finish" / f"{finalist.trial:04d}" / f"seed{seed}"


def finish(runner: Runner, winner: Finalist, baselines: tuple[Finalist, ...], run: Path) -> tuple[Contender, ...]:
    """Retrain on inner + outer with the same seeds, measure on the test split, compare seed by seed.

    Every finalist is trained for the winner's number of epochs.

    Args:
        runner: trains through the ledger.
        winner: the chosen plan.
        baselines: what it is compared with.
        run: the run folder; adapters go to `finish/`.

    Returns:
        The winner first, then the baselines, each with its gain: winner minus baseline.

    Raises:
        TrainingFailed: when the winner diverges with every seed.
    """
    runner.prepared.task.unseal_test()
    epochs, fraction = winner.study.train.epochs, winner.study.train.data_fraction
    seeds = [winner.study.seed + i for i in range(winner.study.search.seeds)]
    entries: list[list[Entry]] = []
    finalists = (winner, *baselines)
    for order, finalist in enumerate(finalists):
        study = dataclasses.replace(
            finalist.study, train=dataclasses.replace(finalist.study.train, epochs=epochs, data_fraction=fraction)
        )
        found = []
        for index, seed in enumerate(seeds):
            runner.emit(
                Event("progress", f"finish {finalist.name}", order * len(seeds) + index, len(finalists) * len(seeds))
            )
            found.append(
                runner.train(
                    study,
                    finalist.allocation,
                    label=f"finish {finalist.name}, seed {seed}",
                    seed=seed,
                    splits=("inner", "outer"),
                    measure=_TEST,
                    folder=adapter_folder(run, finalist, seed),
                    first=finalist.first,
                    stage="finish",
                )
            )
        entries.append(found)
    if all(entry.outcome.status != "done" for entry in entries[0]):
        raise TrainingFailed(f"the chosen plan failed with every seed: {entries[0][0].outcome.reason}")
    return tuple(
        _contender(finalist, entries[0], found, winner.study)
        for finalist, found in zip(finalists, entries, strict=True)
    )


def _contender(finalist: Finalist, winner: list[Entry], own: list[Entry], study: Study) -> Contender:
    sign = 1.0 if study.reward.goals[0] == "maximize" else -1.0
    pairs = [(w, o) for w, o in zip(winner, own, strict=True) if w.outcome.status == o.outcome.status == "done"]
    gain, interval = 0.0, (0.0, 0.0)
    if pairs and winner is not own:
        differences = [sign * (study.reward.value(w.outcome)[0] - study.reward.value(o.outcome)[0]) for w, o in pairs]
        gain = float(np.mean(differences))
        interval = paired_interval([w.merits for w, _ in pairs], [o.merits for _, o in pairs])
    return Contender(
        finalist.name,
        finalist.trial,
        finalist.role,
        finalist.allocation.spent,
        tuple(entry.outcome for entry in own),
        gain,
        interval,
    )


def paired_interval(
    first: Sequence[np.ndarray[Any, Any]], second: Sequence[np.ndarray[Any, Any]]
) -> tuple[float, float]:
    """95 % percentile interval of the difference of mean merits, resampling seeds and test samples together.

    Two-level paired bootstrap: each draw takes seeds with replacement and samples with replacement, the same for both
    contenders.

    Args:
        first: per seed the merit of each sample, such as whether it was classified correctly, shape (n,).
        second: the same for the other contender, same seeds and samples.
    """
    difference = np.stack(first).astype(float) - np.stack(second).astype(float)
    seeds, samples = difference.shape
    rng = np.random.default_rng(0)
    means = np.empty(_DRAWS)
    for draw in range(_DRAWS):
        rows = rng.integers(seeds, size=seeds)
        weights = np.bincount(rng.integers(samples, size=samples), minlength=samples)
        means[draw] = float(difference[rows].mean(axis=0) @ weights) / samples
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
