from __future__ import annotations

import json
import logging
from typing import Any

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from autopeft.core.outcome import Outcome
from autopeft.core.record import Trial
from autopeft.search.entry import as_trial, attributes

OUTCOME = Outcome("done", {"top1": 0.75}, ((1, 0.5), (2, 0.75)), trainable=1198, seconds=3.25159, seed=4)
TRIAL = Trial(
    3, "trial 3", "trial", {"a": 0.5}, "0123456789abcdef", 1198, {"bias": 174, "lora": 1024}, OUTCOME, (0.75,), 512, "p"
)


def _frozen(state: TrialState = TrialState.COMPLETE, **kw: Any) -> FrozenTrial:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study()
    value = 0.75 if state == TrialState.COMPLETE else None
    study.add_trial(
        create_trial(state=state, value=value, params={"a": 0.5}, distributions={"a": FloatDistribution(0, 1)}, **kw)
    )
    return study.trials[0]


def test_round_trip_with_the_studys_number() -> None:
    found = as_trial(_frozen(user_attrs=attributes(TRIAL)))
    assert found.number == 0
    assert found.outcome == OUTCOME
    assert (found.name, found.mix, found.rewards, found.plan) == ("trial 3", TRIAL.mix, (0.75,), "p")


def test_what_the_dashboard_shows() -> None:
    shown = attributes(TRIAL)
    assert shown["mix"] == "lora 1,024, bias 174"
    assert (shown["plan"], shown["trainable"], shown["seconds"]) == ("0123456789abcdef", 1198, 3.252)
    json.dumps(shown)


@pytest.mark.parametrize(
    ("state", "status"), [(TrialState.COMPLETE, "done"), (TrialState.PRUNED, "pruned"), (TrialState.FAIL, "failed")]
)
def test_a_trial_without_a_record(state: TrialState, status: str) -> None:
    found = as_trial(
        _frozen(state, intermediate_values={2: 0.5, 1: 0.25}, user_attrs={"reason": "the loss became nan"})
    )
    assert found.outcome.status == status
    assert found.knobs == {"a": 0.5}
    assert found.outcome.curve == ((1, 0.25), (2, 0.5))
    assert found.rewards == ((0.75,) if status == "done" else ())
    assert found.outcome.reason == "the loss became nan"
    assert as_trial(_frozen(state)).name == "trial 0"


def test_a_damaged_record_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        found = as_trial(_frozen(user_attrs={"record": "{}", "name": "kept"}))
    assert found.name == "kept"
    assert "record of trial 0 cannot be read" in caplog.text
