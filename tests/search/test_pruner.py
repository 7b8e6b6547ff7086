from __future__ import annotations

import math
import random

import optuna
import pytest
from optuna.pruners import SuccessiveHalvingPruner
from optuna.trial import TrialState, create_trial

from autopeft.search.fidelity import Rungs
from autopeft.search.pruner import RungPruner, passes


@pytest.fixture(autouse=True)
def _quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)


def test_passes_by_hand() -> None:
    assert passes(0.5, [0.9], 3, maximize=True)  # two values prove nothing
    assert not passes(0.5, [0.9, 0.1], 3, maximize=True)  # one of three passes
    assert passes(0.9, [0.9, 0.1], 3, maximize=True)  # ties pass
    assert passes(0.5, [0.9, 0.1, 0.2, 0.3, 0.4], 3, maximize=True)  # two of six pass
    assert passes(0.1, [0.5, 0.9], 3, maximize=False)
    assert not passes(0.5, [0.1, 0.9], 3, maximize=False)


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
@pytest.mark.parametrize("seed", range(5))
def test_one_bracket_decides_as_optunas_successive_halving(
    direction: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the third value at a rung on: Optuna stops the second trial at once, we wait for `eta` values."""
    monkeypatch.setattr(Rungs, "bracket", lambda self, ordinal: 0)
    rng = random.Random(seed)
    ours = optuna.create_study(direction=direction, pruner=RungPruner(Rungs(27)))
    reference = optuna.create_study(
        direction=direction, pruner=SuccessiveHalvingPruner(min_resource=1, reduction_factor=3)
    )
    good = [1.0, 0.9, 0.8] if direction == "maximize" else [0.0, 0.1, 0.2]
    for study in (ours, reference):
        for value in good[::-1]:  # each better than the last: all pass under both rules
            trial = study.ask()
            for epoch in range(1, 28):
                trial.report(value, epoch)
                assert not trial.should_prune()
            study.tell(trial, value)
    for _ in range(40):
        curve = [rng.random() for _ in range(27)]
        ends = []
        for study in (ours, reference):
            trial = study.ask()
            end = 28
            for epoch, value in enumerate(curve, 1):
                trial.report(value, epoch)
                if trial.should_prune():
                    end = epoch
                    break
            study.tell(trial, curve[-1]) if end == 28 else study.tell(trial, state=TrialState.PRUNED)
            ends.append(end)
        assert ends[0] == ends[1]


def _study(curves: list[dict[int, float]], **attrs: object) -> optuna.Study:
    study = optuna.create_study(direction="maximize", pruner=RungPruner(Rungs(9)))
    for curve in curves:
        trial = create_trial(state=TrialState.RUNNING, intermediate_values=curve, user_attrs=attrs)
        study.add_trial(trial)
    return study


def _judge(study: optuna.Study, value: float, epoch: int, role: str = "trial") -> bool:
    study.add_trial(
        create_trial(state=TrialState.RUNNING, intermediate_values={epoch: value}, user_attrs={"role": role})
    )
    return study.pruner.prune(study, study.trials[-1])


GOOD = [{1: 0.9, 3: 0.9}] * 6


def test_baselines_are_never_stopped_and_never_compared_with() -> None:
    study = _study(GOOD)
    assert _judge(study, 0.0, 3)
    for role in ("baseline", "default"):
        assert not _judge(_study(GOOD), 0.0, 3, role)
    assert not _judge(_study(GOOD, role="baseline"), 0.0, 3)


def test_replaced_trials_are_not_compared_with() -> None:
    assert not _judge(_study(GOOD, replaced=True), 0.0, 3)


def test_only_rungs_judge() -> None:
    assert not _judge(_study(GOOD), 0.0, 2)
    assert not _judge(_study([{9: 0.9}] * 6), 0.0, 9)


def test_not_a_number_is_stopped_and_not_compared_with() -> None:
    assert _judge(_study([]), math.nan, 2)
    assert not _judge(_study([{1: math.nan, 3: math.nan}] * 6), 0.5, 3)


def test_a_trial_without_a_value_goes_on() -> None:
    study = _study([])
    study.add_trial(create_trial(state=TrialState.RUNNING))
    assert not study.pruner.prune(study, study.trials[-1])
