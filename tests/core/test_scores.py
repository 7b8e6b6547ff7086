from __future__ import annotations

import dataclasses
import math

import pytest

from autopeft.core.scores import Evidence, ScoreOrigin, Scores
from autopeft.core.site import Place, Site
from autopeft.errors import UsageError

ORIGIN = ScoreOrigin("fisher", 64, "cat", "weights", "head", "data")
SITE = Site("fc", "fc", "linear", (2, 2), False, 0, "mlp.fc1", ("weight",))


@pytest.mark.parametrize("bad", [-1e-9, math.nan, math.inf])
def test_a_score_is_finite_and_not_negative(bad: float) -> None:
    with pytest.raises(ValueError, match="score of fc:weight"):
        Scores(ORIGIN, {Place("fc", "weight"): bad})


@pytest.mark.parametrize("name", ["catalog", "weights", "head", "data"])
def test_scores_of_something_else_are_refused(name: str) -> None:
    scores = Scores(ORIGIN, {Place("fc", "weight"): 1.0})
    scores.check(ORIGIN)
    other = dataclasses.replace(ORIGIN, **{name: "another"})
    with pytest.raises(UsageError, match=f"another {name}: they were made from .*, this is another"):
        scores.check(other)
    scores.check(dataclasses.replace(ORIGIN, **{name: ""}))  # not known, so not compared


def test_evidence_of_a_slot_that_was_not_looked_at() -> None:
    evidence = Evidence(SITE, {})
    assert evidence.get("weight") is None
    with pytest.raises(UsageError, match="nothing for slot 'weight' of fc"):
        evidence["weight"]
