"""Stops trials at rungs, with brackets that survive a restart."""

from __future__ import annotations

import math

from optuna.pruners import BasePruner
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial

from autopeft.search.fidelity import Rungs
from autopeft.search.history import is_replaced, ordinal, role_of

__all__ = ["RungPruner", "passes"]


class RungPruner(BasePruner):
    """Asynchronous successive halving (Li et al., MLSys 2020) in the brackets of `Rungs`.

    Optuna's own Hyperband draws the bracket from the trial's number, which changes when a trial is asked again after a
    crash, and hides the other brackets' trials from the sampler. Here the bracket comes from the trial's place in the
    search, and at a rung a trial is compared with every searched trial that has a value at that epoch, whatever its
    bracket. Baselines are neither stopped nor compared with, and what turned out to break a limit is not compared
    with either: its head start is worth nothing.

    Args:
        rungs: where trials are judged.
    """

    def __init__(self, rungs: Rungs) -> None:
        self._rungs = rungs

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        """Whether the trial should stop: at a rung that it does not pass."""
        epoch = trial.last_step
        if epoch is None or role_of(trial) != "trial":
            return False
        value = trial.intermediate_values[epoch]
        if math.isnan(value):
            return True
        trials = study.get_trials(deepcopy=False)
        if epoch not in self._rungs.rungs(self._rungs.bracket(ordinal(trial.number, trials))):
            return False
        others = [
            t.intermediate_values[epoch]
            for t in trials
            if t.number != trial.number
            and role_of(t) == "trial"
            and not is_replaced(t)
            and not any(v > 0 for v in t.constraints.values())
            and not math.isnan(t.intermediate_values.get(epoch, math.nan))
        ]
        return not passes(value, others, self._rungs.eta, study.direction == StudyDirection.MAXIMIZE)


def passes(value: float, others: list[float], eta: int, maximize: bool) -> bool:
    """Whether a value is among the best `1 / eta` of all, itself included; ties pass.

    Fewer than `eta` values prove nothing: the first trials at a rung pass.
    """
    n = len(others) + 1
    if n < eta:
        return True
    sign = -1.0 if maximize else 1.0
    better = sum(1 for other in others if sign * other < sign * value)
    return better < n // eta
