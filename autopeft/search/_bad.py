"""Trials without a value, for samplers that look at complete ones alone."""

from __future__ import annotations

from collections.abc import Sequence

from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

__all__ = ["stopped", "worst"]


def stopped(trial: FrozenTrial) -> FrozenTrial:
    """The trial as one that was stopped before its first value, which TPE ranks behind all others."""
    return create_trial(state=TrialState.PRUNED, params=trial.params, distributions=trial.distributions)


def worst(trials: Sequence[FrozenTrial], directions: Sequence[StudyDirection]) -> list[FrozenTrial]:
    """The complete trials, and the failed and pruned ones with the worst value that was seen in each goal.

    Those that run stay as they are; without any complete trial nothing is known of the others either.
    """
    done = [t.values for t in trials if t.state == TrialState.COMPLETE]
    if not done:
        return [t for t in trials if not t.state.is_finished()]
    values = [
        min(axis) if direction == StudyDirection.MAXIMIZE else max(axis)
        for axis, direction in zip(zip(*done, strict=True), directions, strict=True)
    ]
    return [
        create_trial(params=t.params, distributions=t.distributions, values=values)
        if t.state in (TrialState.FAIL, TrialState.PRUNED)
        else t
        for t in trials
    ]
