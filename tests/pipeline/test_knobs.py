from __future__ import annotations

import dataclasses

from autopeft.config.override import override
from autopeft.config.spaces import load_space
from autopeft.config.study import DEFAULT_METHODS, Study
from autopeft.core.space import Knob, Space
from autopeft.pipeline.knobs import apply_knobs, relevant_space

SPACE = Space(
    (
        Knob("gain.methods.lora", 0.1, 10.0, log=True),
        Knob("gain.methods.core", 0.1, 10.0, log=True),
        Knob("gain.exponent", 0.2, 1.0),
        Knob("train.lr.matrix", 1e-4, 1e-1, log=True),
        Knob("train.lr.core", 1e-4, 1e-1, log=True),
        Knob("train.lr.head", 1e-4, 1e-1, log=True),
    )
)


def paths(space: Space) -> list[str]:
    return [knob.path for knob in space]


def test_knobs_of_what_the_study_lacks_are_left_out() -> None:
    study = Study()
    lora = dataclasses.replace(study, methods={"lora": study.methods["lora"]})
    assert paths(relevant_space(SPACE, lora)) == [
        "gain.methods.lora", "gain.exponent", "train.lr.matrix", "train.lr.head",
    ]  # fmt: skip
    assert relevant_space(SPACE, study) == SPACE


def test_knobs_of_settings_that_nobody_has_are_left_out() -> None:
    study = Study()
    knobs = (Knob("scorer.power", choices=(0.25, 0.5)), Knob("methods.lora.alpha", 1.0, 2.0))
    assert paths(relevant_space(Space(knobs), study)) == ["scorer.power", "methods.lora.alpha"]
    other = override(study, {"scorer": "magnitude", "methods": ["core"]})
    assert paths(relevant_space(Space(knobs), other)) == []


def test_the_default_space_of_the_default_study() -> None:
    """Every method that it has a knob for, and every other knob, in the order of the file."""
    space = load_space("mixed_methods")
    found = paths(relevant_space(space, Study()))
    methods = [p.removeprefix("gain.methods.") for p in found if p.startswith("gain.methods.")]
    assert set(methods) <= set(DEFAULT_METHODS)
    assert found == [p for p in paths(space) if p in found]
    assert {p for p in paths(space) if not p.startswith("gain.methods.")} <= set(found)


def test_applying_ignores_methods_that_the_study_lacks() -> None:
    study = Study()
    lora = dataclasses.replace(study, methods={"lora": study.methods["lora"]})
    found = apply_knobs(lora, {"gain.methods.lora": 2.0, "gain.methods.core": 3.0, "gain.exponent": 0.7})
    assert found.gain.methods == {"lora": 2.0}
    assert found.gain.exponent == 0.7
