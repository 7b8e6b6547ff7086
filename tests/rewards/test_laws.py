from __future__ import annotations

import pytest

from autopeft.core.contracts import Reward
from autopeft.core.registry import Registry
from autopeft.rewards import BUILTIN
from autopeft.rewards.cost import MetricWithCost
from autopeft.rewards.metric import Metric
from autopeft.testing.reward_laws import BROKEN, RewardLaws

LAWS = sorted(name for name in vars(RewardLaws) if name.startswith("test_"))


class TestMetric(RewardLaws):
    def reward(self) -> Reward:
        return Metric()


class TestMinimisedMetric(RewardLaws):
    def reward(self) -> Reward:
        return Metric("nll", "minimize")


class TestMetricWithCost(RewardLaws):
    def reward(self) -> Reward:
        return MetricWithCost()


def test_every_law_has_a_broken_reward() -> None:
    assert sorted(BROKEN) == LAWS


@pytest.mark.parametrize("broken", sorted(BROKEN))
def test_a_broken_reward_breaks_its_law_alone(broken: str) -> None:
    class Laws(RewardLaws):
        def reward(self) -> Reward:
            return BROKEN[broken]()

    for law in LAWS:
        if law == broken:
            with pytest.raises(AssertionError):
                getattr(Laws(), law)()
        else:
            getattr(Laws(), law)()


def test_the_table_names_the_classes() -> None:
    registry: Registry[Reward] = Registry("reward", "autopeft.rewards", BUILTIN)
    assert registry["metric"] is Metric
    assert all(registry[name].__module__.startswith("autopeft.rewards.") for name in BUILTIN)
    assert registry["metric_with_cost"] is MetricWithCost
