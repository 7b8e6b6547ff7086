"""A space of knobs as Optuna's distributions, and values for all of its knobs."""

from __future__ import annotations

import math
from collections.abc import Mapping

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.trial import Trial

from autopeft.core.space import Knob, Space, Value

__all__ = ["complete_values", "distributions", "suggest_all"]


def distributions(space: Space) -> dict[str, BaseDistribution]:
    """One distribution per knob; numeric knobs are floats, whole numbers are choices."""
    return {knob.path: _distribution(knob) for knob in space}


def suggest_all(trial: Trial, space: Space) -> dict[str, Value]:
    """Every knob of the space with the value that the trial's sampler gives it, stored in the trial."""
    values: dict[str, Value] = {}
    for knob in space:
        if knob.choices:
            choice: Value = trial.suggest_categorical(knob.path, list(knob.choices))  # type: ignore[assignment]  # no None
            values[knob.path] = choice
        else:
            assert knob.low is not None
            assert knob.high is not None
            values[knob.path] = trial.suggest_float(knob.path, knob.low, knob.high, log=knob.log)
    return values


def complete_values(space: Space, values: Mapping[str, Value]) -> dict[str, Value]:
    """The values with the knobs that are missing at their default, or in the middle of their range without one.

    Raises:
        UnknownKey: for a knob that the space does not have.
        UsageError: for a value outside of its knob's range.
    """
    space.check(values)
    return {knob.path: values.get(knob.path, _unsearched(knob)) for knob in space}


def _distribution(knob: Knob) -> BaseDistribution:
    if knob.choices:
        return CategoricalDistribution(knob.choices)
    assert knob.low is not None
    assert knob.high is not None
    return FloatDistribution(knob.low, knob.high, log=knob.log)


def _unsearched(knob: Knob) -> Value:
    if knob.default is not None:
        return knob.default
    if knob.choices:
        return knob.choices[0]
    assert knob.low is not None
    assert knob.high is not None
    return math.sqrt(knob.low * knob.high) if knob.log else (knob.low + knob.high) / 2
