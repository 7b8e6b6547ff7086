from __future__ import annotations

import math
from typing import Any

import pytest

from autopeft.core.outcome import Outcome


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"status": "running"}, "status must be one of done, pruned, failed"),
        ({"status": "done"}, "needs metrics"),
        ({"status": "failed"}, "needs a reason"),
        ({"status": "done", "metrics": {"top1": 0.5, "nll": math.nan}}, "not so: nll"),
        ({"status": "pruned", "metrics": {"top1": math.inf}}, "not so: top1"),
        ({"status": "pruned", "trainable": -1}, "at least 0"),
    ],
)
def test_an_outcome_is_checked(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Outcome(**values)


def test_outcomes_of_every_status() -> None:
    assert Outcome("done", {"top1": 0.5}).split == "outer"
    assert Outcome("pruned", curve=((1, 0.25),)).metrics == {}
    assert Outcome("failed", reason="the loss became NaN").trainable == 0
