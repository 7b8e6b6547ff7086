from __future__ import annotations

import pytest

from autopeft.core.outcome import Outcome
from autopeft.errors import UnknownKey, UsageError
from autopeft.rewards.metric import Metric


def test_value_is_the_metric() -> None:
    outcome = Outcome("done", {"top1": 0.75, "nll": 0.5})
    assert Metric().value(outcome) == (0.75,)
    assert Metric("nll", "minimize").value(outcome) == (0.5,)


def test_an_unknown_metric_is_guessed() -> None:
    with pytest.raises(UnknownKey, match=r"'top_1'.*Did you mean 'top1'\?.*Measured: nll, top1"):
        Metric("top_1").value(Outcome("done", {"top1": 0.75, "nll": 0.5}))


@pytest.mark.parametrize("settings", [{"name": ""}, {"direction": "up"}])
def test_bad_settings_are_refused(settings: dict[str, str]) -> None:
    with pytest.raises(UsageError):
        Metric(**settings)
