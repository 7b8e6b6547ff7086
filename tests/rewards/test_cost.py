from __future__ import annotations

import pytest

from autopeft.core.outcome import Outcome
from autopeft.errors import UnknownKey, UsageError
from autopeft.rewards.cost import MetricWithCost
from autopeft.rewards.metric import Metric


def test_parameters_are_paid_for() -> None:
    outcome = Outcome("done", {"top1": 0.75, "nll": 0.5}, trainable=5000)
    # Half of the 10,000 parameters that 0.01 is the price of: 0.005.
    assert MetricWithCost().value(outcome) == pytest.approx((0.745,))
    assert MetricWithCost("nll", "minimize").value(outcome) == pytest.approx((0.505,))
    assert MetricWithCost(weight=0.2, per=1000).value(outcome) == pytest.approx((-0.25,))


def test_a_cheaper_plan_wins_unless_the_rest_earns_its_price() -> None:
    reward = MetricWithCost(weight=0.01, per=1000)
    cheap = Outcome("done", {"top1": 0.80}, trainable=1000)
    assert reward.value(cheap) > reward.value(Outcome("done", {"top1": 0.805}, trainable=2000))
    assert reward.value(cheap) < reward.value(Outcome("done", {"top1": 0.815}, trainable=2000))


def test_without_weight_it_is_the_metric() -> None:
    outcome = Outcome("done", {"top1": 0.75}, trainable=5000)
    assert MetricWithCost(weight=0.0).value(outcome) == Metric().value(outcome)
    assert MetricWithCost().names == Metric().names


def test_an_unknown_metric_is_guessed() -> None:
    with pytest.raises(UnknownKey, match="Did you mean 'macro_f1'"):
        MetricWithCost("macro_f").value(Outcome("done", {"macro_f1": 0.75}))


@pytest.mark.parametrize(
    "settings",
    [{"name": ""}, {"direction": "up"}, {"weight": -0.1}, {"weight": float("nan")}, {"per": 0}],
)
def test_bad_settings_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        MetricWithCost(**settings)  # type: ignore[arg-type]
