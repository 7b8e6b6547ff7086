from __future__ import annotations

import json

import pytest

from autopeft.core.codec import decode, encode
from autopeft.core.outcome import Outcome
from autopeft.core.record import Contender, Record, Trial
from autopeft.errors import CorruptFile

DONE = Outcome("done", {"top1": 0.75}, ((1, 0.5), (2, 0.75)), 100, 1.5, 2048, 3)
FAILED = Outcome("failed", reason="the loss became NaN")


def trial(outcome: Outcome, rewards: tuple[float, ...]) -> Trial:
    return Trial(4, "trial 4", "trial", {"gain.exponent": 0.5}, "abcd", 100, {"lora": 100}, outcome, rewards, 640)


@pytest.mark.parametrize(("outcome", "rewards"), [(DONE, ()), (FAILED, (0.5,))])
def test_rewards_are_there_exactly_when_the_trial_is_done(outcome: Outcome, rewards: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"trial 4 is (done|failed) and has"):
        trial(outcome, rewards)


def test_a_record_survives_json() -> None:
    record = Record(
        "runs/a",
        {"seed": 0},
        {"name": "tiny"},
        {"classes": ["a", "b"]},
        {"limit": 100, "unit": "trainable"},
        (trial(DONE, (0.75,)), trial(FAILED, ())),
        4,
        (Contender("trial 4", 4, "trial", 100, (DONE,), 0.0, (-0.5, 0.25)),),
        {"timm": "exports/timm"},
        {"search": 640.0},
        {"torch": "2"},
        {"search": 1.5},
    )
    data = json.loads(json.dumps(encode(record)))
    assert data["schema"] == "autopeft.record/1"
    assert decode(Record, data) == record


def test_a_record_of_another_format_is_refused() -> None:
    with pytest.raises(CorruptFile, match=r"record\.json: written in format 'autopeft.record/9', this version reads"):
        decode(Record, {"schema": "autopeft.record/9"}, "record.json")
