"""Which candidate is taken: by likelihood where the goal is an accuracy, else by the goal."""

import dataclasses
from types import SimpleNamespace

import pytest

from autopeft.config.study import SearchSettings, Study
from autopeft.core.outcome import Outcome
from autopeft.errors import UsageError
from autopeft.pipeline.runner import Runner
from autopeft.rewards.joint import Joint
from autopeft.rewards.metric import Metric
from autopeft.rewards.parameters import Parameters

RUNNER = Runner(SimpleNamespace(), SimpleNamespace(), lambda event: None)
SURE = Outcome("done", {"top1": 0.63, "macro_f1": 0.6, "nll": 1.26, "scaled_nll": 1.25}, trainable=10)
BETTER = Outcome("done", {"top1": 0.605, "macro_f1": 0.5, "nll": 1.30, "scaled_nll": 1.19}, trainable=20)


def study(reward=None, **search):
    base = Study()
    return dataclasses.replace(base, reward=reward or base.reward, search=dataclasses.replace(base.search, **search))


def first(settings, *outcomes):
    return max(outcomes, key=lambda outcome: RUNNER.rank(settings, outcome))


@pytest.mark.parametrize("name", ["top1", "macro_f1"])
def test_the_likelihood_at_the_best_temperature_decides_between_accuracies(name):
    settings = study(Metric(name))
    assert settings.chosen_by == "scaled_nll"
    assert first(settings, SURE, BETTER) is BETTER
    assert first(study(Metric(name), choose="goal"), SURE, BETTER) is SURE


def test_another_goal_decides_by_itself():
    assert study(Metric("nll", "minimize")).chosen_by == "nll"
    assert first(study(Metric("nll", "minimize")), SURE, BETTER) is SURE
    front = study(Joint((Metric("top1"), Parameters())))
    assert (front.goals.mode, front.chosen_by) == ("pareto", "top1")
    assert first(front, SURE, BETTER) is SURE


def test_limits_come_before_the_likelihood():
    settings = study(Joint((Metric("top1"), Parameters())), limits={"parameters": 15.0})
    assert (settings.goals.mode, settings.chosen_by) == ("epsilon", "scaled_nll")
    assert first(settings, SURE, BETTER) is SURE
    assert first(study(Joint((Metric("top1"), Parameters())), limits={"parameters": 25.0}), SURE, BETTER) is BETTER


def test_ties_go_to_the_goal_and_trainings_without_an_end_are_last():
    twin = dataclasses.replace(BETTER, metrics={**BETTER.metrics, "top1": 0.61})
    failed = Outcome("failed", reason="diverged")
    assert first(study(), BETTER, twin) is twin
    assert first(study(), failed, SURE) is SURE


def test_a_task_that_measures_no_likelihood_is_chosen_by_the_goal():
    one, two = (Outcome("done", {"top1": value}) for value in (0.5, 0.7))
    assert first(study(), one, two) is two


def test_a_word_that_is_neither_is_refused():
    with pytest.raises(UsageError, match=r"search.choose must be one of likelihood, goal, got 'best'"):
        SearchSettings(choose="best")
