from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optuna
import pytest
from optuna.samplers import TPESampler
from optuna.trial import TrialState, create_trial

from autopeft.core.space import Knob, Space
from autopeft.search.knobs import distributions, suggest_all
from autopeft.search.sampler import HistorySampler
from autopeft.search.tpe import TPE
from autopeft.training.seeds import derive_seed

SPACE = Space(tuple(Knob(f"k{i}", 0.0, 1.0) for i in range(3)))
Edit = Callable[[optuna.Study], None]


@pytest.fixture(autouse=True)
def _quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)


def _study(n: int = 8, startup: int = 4, edit: Edit = lambda study: None, seed: int = 3) -> optuna.Study:
    study = optuna.create_study(direction="maximize", sampler=HistorySampler(SPACE, seed, TPE(startup)))
    for i in range(n):
        values = {f"k{j}": ((7 * i + 3 * j) % 11) / 11 for j in range(3)}
        study.add_trial(create_trial(params=values, distributions=distributions(SPACE), value=-sum(values.values())))
    edit(study)
    return study


def _next(study: optuna.Study) -> dict[str, Any]:
    return suggest_all(study.ask(), SPACE)


def test_equals_a_fresh_tpe_with_the_derived_seed() -> None:
    study = _study()
    twin = optuna.create_study(
        direction="maximize",
        sampler=TPESampler(seed=derive_seed(3, "sampler", 8), multivariate=True, n_startup_trials=4),
    )
    twin.add_trials(study.trials)
    assert _next(study) == twin.ask(distributions(SPACE)).params


def test_same_seed_same_history_same_values_and_otherwise_others() -> None:
    expected = _next(_study())
    assert _next(_study()) == expected
    assert _next(_study(seed=4)) != expected
    assert _next(_study(n=9)) != expected


def test_it_learns() -> None:
    """With TPE on, the mean of suggestions moves to the good corner; at random it stays in the middle."""

    def mean(startup: int) -> float:
        study = _study(n=30, startup=startup)
        total = 0.0
        for _ in range(12):
            trial = study.ask()
            values = suggest_all(trial, SPACE)
            total += sum(float(v) for v in values.values()) / 3
            study.tell(trial, -sum(float(v) for v in values.values()))
        return total / 12

    assert mean(startup=4) < 0.3 < 0.4 < mean(startup=1000)


def test_a_trial_without_parameters_does_not_switch_the_joint_model_off() -> None:
    with_bare = _study(edit=lambda s: s.add_trial(create_trial(value=0.0, user_attrs={"role": "baseline"})))
    assert _next(with_bare) == _next(_study())


def test_replaced_and_waiting_trials_leave_no_trace() -> None:
    def crash(study: optuna.Study) -> None:
        params = {f"k{j}": 0.5 for j in range(3)}
        lost = create_trial(
            state=TrialState.FAIL, params=params, distributions=distributions(SPACE), user_attrs={"replaced": True}
        )
        study.add_trial(lost)

    assert _next(_study(edit=crash)) == _next(_study())


def test_failed_trials_count_as_bad_ones() -> None:
    params = {f"k{j}": 0.05 for j in range(3)}

    def add(state: TrialState, **values: Any) -> Edit:
        return lambda study: study.add_trial(
            create_trial(state=state, params=params, distributions=distributions(SPACE), **values)
        )

    failed = _next(_study(edit=add(TrialState.FAIL)))
    assert failed == _next(_study(edit=add(TrialState.PRUNED)))  # stopped before its first value: the worst there is
    assert failed == _next(_study(edit=add(TrialState.COMPLETE, value=-100.0)))
    assert failed != _next(_study(edit=add(TrialState.COMPLETE, value=100.0)))


def test_running_trials_push_away() -> None:
    study = _study(n=20)
    first, second = _next(study), _next(study)
    assert first != second


def test_pins_stay_and_the_rest_is_sampled() -> None:
    study = _study()
    sampler = study.sampler
    assert isinstance(sampler, HistorySampler)
    sampler.pins = {"k1": 0.125}
    values = _next(study)
    assert values["k1"] == 0.125
    assert values["k0"] == _next(_study())["k0"]
    sampler.pins = {"k0": 0.1, "k1": 0.2, "k2": 0.3}
    assert _next(study) == sampler.pins


def test_parameters_outside_of_the_space_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="other is not a knob"):
        _study().ask().suggest_float("other", 0, 1)
