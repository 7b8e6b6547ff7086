"""One way to tune for every contender: the same learning rates, the same short runs, the same full runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from autopeft.core.outcome import Outcome
from autopeft.errors import UsageError
from autopeft.pipeline.contenders import Candidate, Group
from autopeft.pipeline.costs import run_cost
from autopeft.pipeline.runner import Runner

if TYPE_CHECKING:
    from autopeft.config.study import Study
    from autopeft.pipeline.effort import Effort

__all__ = ["Tuned", "learning_rate_scales", "tune", "tune_within"]

_STEP = 10**0.5
"""Learning rates are tried half a decade apart."""


@dataclass(frozen=True)
class Tuned:
    """A contender with its best variant and learning rate.

    Attributes:
        candidate: the variant.
        study: the study with the learning rate, that the variant trains under.
        lr_scale: factor on the learning rates.
        outcome: outcome of the full run, on the outer split.
        variants: name of each variant to its reward after the short run at its best learning rate; empty when there
            was nothing to choose from.
    """

    candidate: Candidate
    study: Study
    lr_scale: float
    outcome: Outcome
    variants: Mapping[str, float] = field(default_factory=dict)


def learning_rate_scales(tries: int) -> tuple[float, ...]:
    """`tries` factors half a decade apart: 1; 0.32 and 1; 0.32, 1 and 3.2; ..."""
    low = -(tries // 2)
    return tuple(_STEP**i for i in range(low, low + tries))


def tune(runner: Runner, study: Study, group: Group, effort: Effort) -> Tuned:
    """Run every variant at every learning rate for one rung, then the best one in full at its rate and a larger one.

    The short runs have complete schedules of their own. The best is the first in `Runner.rank` on the outer split; ties
    go to the earlier run. What is best for a short run is too small a rate for a whole one (studies/selection), hence
    the second full run, half a decade up; with a single try there is none. The head's rate is nobody's to tune, so a
    plan without adapters is run once.
    """
    stage = "default" if group.role == "default" else "baselines"
    scales = learning_rate_scales(effort.tries or study.search.tries)
    arms = [
        (candidate, scale)
        for candidate in group.candidates
        for scale in (scales if len(candidate.allocation) else (1.0,))
    ]
    best = arms[0]
    rewards: dict[str, float] = {}
    if len(arms) > 1:
        ranked = []
        for order, (candidate, scale) in enumerate(arms):
            trial = _with(candidate.under(study), scale, effort.rung, effort.fraction)
            label = f"{candidate.name}, learning rate x{scale:.2g}"
            entry = runner.train(trial, candidate.allocation, label=label, stage=stage)
            ranked.append((runner.rank(trial, entry.outcome), -order))
            if entry.outcome.status == "done":
                pick = max if study.reward.goals[0] == "maximize" else min
                value = study.reward.value(entry.outcome)[0]
                rewards[candidate.name] = pick(value, rewards.get(candidate.name, value))
        best = arms[-max(ranked)[1]]
    candidate, scale = best
    full: list[tuple[tuple[float, ...], int, Tuned]] = []
    for factor in (1.0, _STEP) if len(scales) > 1 and len(candidate.allocation) else (1.0,):
        chosen = _with(candidate.under(study), scale * factor, effort.epochs, effort.fraction)
        label = candidate.name if factor == 1 else f"{candidate.name}, learning rate x{scale * factor:.2g}"
        entry = runner.train(chosen, candidate.allocation, label=label, stage=stage)
        tuned = Tuned(candidate, chosen, scale * factor, entry.outcome, rewards)
        full.append((runner.rank(chosen, entry.outcome), -len(full), tuned))
    return max(full, key=lambda run: run[:2])[2]


def tune_within(runner: Runner, study: Study, group: Group, effort: Effort, allowance: float) -> Tuned:
    """The first variant, by short runs alone, within an allowance of passes.

    It takes the best of three learning rates, or of two, where the allowance bears a rung of each; shorter runs choose
    too small a rate (studies/selection), so that otherwise the usual one runs alone, for as long as the allowance
    bears. Runs have complete schedules of their own.

    Raises:
        UsageError: when it bears no epoch at all.
    """
    candidate = group.candidates[0]
    scales = {3: learning_rate_scales(3), 2: learning_rate_scales(2), 1: (1.0,)}
    per_epoch, fixed = run_cost(runner.prepared, 1, effort.fraction, 0), run_cost(runner.prepared, 0, 1.0)
    for tries in (3, 2, 1):
        epochs = min(effort.epochs, int((allowance / tries - fixed) // per_epoch))
        if epochs >= (1 if tries == 1 else effort.rung):
            break
    else:
        raise UsageError(
            f"one epoch of the default plan needs {per_epoch + fixed:,.0f} passes and {max(0.0, allowance):,.0f} are "
            f"left; train for more epochs (--epochs), or use --tier race"
        )
    runs: list[tuple[tuple[float, ...], int, Tuned]] = []
    for scale in scales[tries]:
        chosen = _with(study, scale, epochs, effort.fraction)
        label = f"{candidate.name}, learning rate x{scale:.2g}"
        entry = runner.train(chosen, candidate.allocation, label=label, stage="default")
        runs.append((runner.rank(chosen, entry.outcome), -len(runs), Tuned(candidate, chosen, scale, entry.outcome)))
    return max(runs, key=lambda run: run[:2])[2]


def _with(study: Study, lr_scale: float, epochs: int, fraction: float) -> Study:
    scale = study.train.lr_scale * lr_scale
    train = dataclasses.replace(study.train, lr_scale=scale, epochs=epochs, data_fraction=fraction)
    return dataclasses.replace(study, train=train)
