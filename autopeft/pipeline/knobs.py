"""Knob values of a search space to a study, and of a baseline to knob values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from autopeft.config.override import override
from autopeft.core.space import Knob, Space, Value

if TYPE_CHECKING:
    from autopeft.config.study import Study
    from autopeft.pipeline.tune import Tuned

__all__ = ["apply_knobs", "baseline_values", "relevant_space"]

_METHODS = "gain.methods."
_SETTINGS = "methods."
_SCORER = "scorer."
_SPEND = "spend"
_RATES = "train.lr."


def relevant_space(space: Space, study: Study) -> Space:
    """The knobs that can matter to a study.

    None of methods that it does not have, no rates of families it lacks, no settings that its scorer does not have.

    One space serves studies of many methods without making the sampler learn about knobs that do nothing. It is the
    same for every trial of a study.
    """
    families = {method.family for method in study.methods.values()} | {"head"}

    def matters(path: str) -> bool:
        if path.startswith(_METHODS):
            return path.removeprefix(_METHODS) in study.methods
        if path.startswith(_SETTINGS):
            return path.split(".")[1] in study.methods
        if path.startswith(_SCORER):
            return hasattr(study.scorer, path.removeprefix(_SCORER))
        return not path.startswith(_RATES) or path.removeprefix(_RATES) in families

    return Space(tuple(knob for knob in space if matters(knob.path)))


def apply_knobs(study: Study, values: Mapping[str, Value]) -> Study:
    """The study with the knobs of one trial set; it is checked again as a whole.

    Knobs of methods that the study does not have are ignored: knobs are unconditional, so that one joint model of all
    of them can be learnt.
    """
    used = {
        path: value
        for path, value in values.items()
        if not path.startswith(_METHODS) or path.removeprefix(_METHODS) in study.methods
    }
    return override(study, used)


def baseline_values(space: Space, tuned: Tuned, *, is_default: bool) -> dict[str, Value]:
    """The point of the space that describes a contender best.

    Every trial of the study carries every knob. The default plan has the defaults. A baseline is told as a plan whose
    own methods are favoured and whose other methods are not, so that the sampler learns from it that this mix gave
    this reward, not that the defaults did. Learning rates carry the tuned factor.
    """
    values: dict[str, Value] = {}
    used = {option.method for option in tuned.candidate.allocation.options}
    for knob in space:
        default = _middle(knob) if knob.default is None else knob.default
        if knob.path == _SPEND and not knob.choices:
            plan = tuned.candidate.allocation
            values[knob.path] = _clipped(knob, plan.spent / max(1, plan.budget.limit))
        elif knob.path.startswith(_METHODS) and not is_default and not knob.choices:
            favoured = knob.path.removeprefix(_METHODS) in used
            bound = knob.high if favoured else knob.low
            assert bound is not None
            values[knob.path] = bound
        elif knob.path.startswith(_RATES) and isinstance(default, int | float) and not knob.choices:
            factor = 1.0 if knob.path == f"{_RATES}head" else tuned.lr_scale
            values[knob.path] = _clipped(knob, default * factor)
        else:
            values[knob.path] = default
    return values


def _middle(knob: Knob) -> Value:
    if knob.choices:
        return knob.choices[0]
    assert knob.low is not None
    assert knob.high is not None
    return math.sqrt(knob.low * knob.high) if knob.log else (knob.low + knob.high) / 2


def _clipped(knob: Knob, value: float) -> float:
    assert knob.low is not None
    assert knob.high is not None
    return min(max(value, knob.low), knob.high)
