"""One way to tune for every contender: the same number of learning rates, the same short runs, then one full run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from autopeft.core.outcome import Outcome
from autopeft.pipeline.contenders import Candidate, Group
from autopeft.pipeline.runner import Runner

if TYPE_CHECKING:
    from autopeft.config.study import Study
    from autopeft.pipeline.effort import Effort

__all__ = ["Tuned", "learning_rate_scales", "tune"]

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
    """Run every variant at every learning rate for one rung, then the best one in full.

    The short runs have complete schedules of their own. The best has the highest reward on the outer split; ties go
    to the lower negative log-likelihood, then to the earlier variant.
    """
    scales = learning_rate_scales(effort.tries or study.search.tries)
    arms = [(candidate, scale) for candidate in group.candidates for scale in scales]
    best = arms[0]
    rewards: dict[str, float] = {}
    if len(arms) > 1:
        ranked = []
        for order, (candidate, scale) in enumerate(arms):
            trial = _with(candidate.under(study), scale, effort.rung, effort.fraction)
            entry = runner.train(trial, candidate.allocation, label=f"{candidate.name}, learning rate x{scale:.2g}")
            ranked.append((runner.rank(trial, entry.outcome), -order))
            if entry.outcome.status == "done":
                pick = max if study.reward.goals[0] == "maximize" else min
                value = study.reward.value(entry.outcome)[0]
                rewards[candidate.name] = pick(value, rewards.get(candidate.name, value))
        best = arms[-max(ranked)[1]]
    candidate, scale = best
    chosen = _with(candidate.under(study), scale, effort.epochs, effort.fraction)
    entry = runner.train(chosen, candidate.allocation, label=candidate.name)
    return Tuned(candidate, chosen, scale, entry.outcome, rewards)


def _with(study: Study, lr_scale: float, epochs: int, fraction: float) -> Study:
    scale = study.train.lr_scale * lr_scale
    train = dataclasses.replace(study.train, lr_scale=scale, epochs=epochs, data_fraction=fraction)
    return dataclasses.replace(study, train=train)
