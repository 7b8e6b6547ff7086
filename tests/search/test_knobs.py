from __future__ import annotations

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution

from autopeft.core.space import Knob, Space
from autopeft.errors import UnknownKey, UsageError
from autopeft.search.knobs import complete_values, distributions, suggest_all


def test_distributions(space: Space) -> None:
    assert distributions(space) == {
        "a": FloatDistribution(0.0, 1.0),
        "rate": FloatDistribution(1e-4, 1.0, log=True),
        "kind": CategoricalDistribution((1, 2, "x")),
    }


def test_suggestions_have_the_same_distributions(space: Space) -> None:
    trial = optuna.trial.FixedTrial({"a": 0.25, "rate": 0.5, "kind": "x"})
    assert suggest_all(trial, space) == {"a": 0.25, "rate": 0.5, "kind": "x"}  # type: ignore[arg-type]
    assert trial.distributions == distributions(space)


def test_missing_knobs_are_unsearched() -> None:
    space = Space(
        (
            Knob("a", 0.0, 1.0, default=0.2),
            Knob("b", 1.0, 3.0),
            Knob("c", 1e-4, 1.0, log=True),
            Knob("d", choices=(7, 8)),
        )
    )
    assert complete_values(space, {}) == {"a": 0.2, "b": 2.0, "c": pytest.approx(1e-2), "d": 7}
    assert complete_values(space, {"a": 0.0, "d": 8})["a"] == 0.0


def test_values_are_checked(space: Space) -> None:
    with pytest.raises(UnknownKey):
        complete_values(space, {"b": 1})
    with pytest.raises(UsageError):
        complete_values(space, {"a": 1.5})
