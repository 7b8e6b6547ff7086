"""Laws of rewards, as tests to inherit."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from autopeft.core.contracts import Reward, Task
from autopeft.core.outcome import Outcome, Split
from autopeft.errors import UsageError
from autopeft.testing.toy_task import ToyTask

__all__ = ["BROKEN", "RewardLaws"]


class RewardLaws:
    """Every reward passes these; inherit, name the class `Test...` and fill in `reward`.

    Override `outcomes` when the reward needs metrics beyond those of classification, and `task` when it asks more of
    the task. `BROKEN` holds one reward per law that breaks this law and no other.
    """

    def reward(self) -> Reward:
        """The reward under test."""
        raise NotImplementedError

    def outcomes(self) -> Sequence[Outcome]:
        """Outcomes that are done and carry every metric the reward needs."""
        return [
            Outcome("done", {"top1": top1, "macro_f1": top1, "ece": 0.1, "nll": 1 - top1}, trainable=trainable)
            for top1, trainable in ((0.0, 0), (0.5, 1000), (1.0, 123_456))
        ]

    def task(self) -> Task:
        """A task that the reward can measure on; `autopeft.testing.toy_generator.ToyGenerator` also makes images."""
        return ToyTask()

    def model(self) -> nn.Module:
        """A model of the task, with a layer whose mode matters."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(192), nn.Dropout(0.5), nn.Linear(192, 4))
        model[1].eval()
        return model

    def test_one_number_and_one_name_per_goal(self) -> None:
        reward = self.reward()
        assert reward.goals, "a reward needs at least one goal"
        assert all(goal in ("maximize", "minimize") for goal in reward.goals), f"unknown goal in {reward.goals}"
        assert len(reward.names) == len(reward.goals), f"{len(reward.names)} names for {len(reward.goals)} goals"
        for outcome in self.outcomes():
            value = reward.value(outcome)
            assert len(value) == len(reward.goals), f"{len(value)} numbers for {len(reward.goals)} goals"

    def test_value_is_finite(self) -> None:
        for outcome in self.outcomes():
            value = self.reward().value(outcome)
            assert all(math.isfinite(v) for v in value), f"the reward of {outcome} is {value}"

    def test_value_is_pure(self) -> None:
        reward, outcomes = self.reward(), self.outcomes()
        before = copy.deepcopy(list(outcomes))
        first = [reward.value(outcome) for outcome in outcomes]
        second = [reward.value(outcome) for outcome in reversed(outcomes)][::-1]
        assert first == second, f"the same outcomes gave {first}, then {second}"
        assert list(outcomes) == before, "the outcomes were changed"

    def test_an_outcome_that_is_not_done_is_refused(self) -> None:
        for status in ("failed", "pruned"):
            refused = False
            try:
                self.reward().value(Outcome(status, reason="stopped"))
            except UsageError:
                refused = True
            assert refused, f"an outcome that is {status} was given a reward"

    def test_measuring_leaves_the_model_alone(self) -> None:
        task, model = self.task(), self.model()
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        modes = [module.training for module in model.modules()]
        random = torch.get_rng_state()
        metrics = self.reward().measure(model, task, "outer")
        assert all(math.isfinite(v) for v in metrics.values()), f"measured {dict(metrics)}"
        assert [module.training for module in model.modules()] == modes, "the mode of a module was changed"
        assert all(torch.equal(state[name], t) for name, t in model.state_dict().items()), "a tensor was changed"
        assert torch.equal(torch.get_rng_state(), random), "the random state was changed"

    def test_what_was_measured_has_a_value(self) -> None:
        """The task's metrics with the reward's own, as a trial puts them together, suffice; none is overwritten."""
        reward, task, model = self.reward(), self.task(), self.model()
        metrics = dict(task.evaluate(model, "outer"))
        measured = dict(reward.measure(model, task, "outer"))
        clash = sorted(metrics.keys() & measured.keys())
        assert not clash, f"measuring overwrites the task's own {', '.join(clash)}"
        value = reward.value(Outcome("done", {**metrics, **measured}, trainable=772))
        assert value, f"the reward of {metrics | measured} is empty"


@dataclass(frozen=True, slots=True)
class _Plain:
    """Top-1: keeps every law."""

    @property
    def goals(self) -> tuple[str, ...]:
        return ("maximize",)

    @property
    def names(self) -> tuple[str, ...]:
        return ("top1",)

    def measure(self, model: nn.Module, task: Task, split: Split) -> Mapping[str, float]:
        return {}

    def value(self, outcome: Outcome) -> tuple[float, ...]:
        if outcome.status != "done":
            raise UsageError("only an outcome that is done has rewards")
        return (outcome.metrics["top1"],)


class _TwoNumbers(_Plain):
    """Gives two numbers for one goal."""

    def value(self, outcome: Outcome) -> tuple[float, ...]:
        return (_Plain.value(self, outcome)[0], float(outcome.trainable))


class _Logarithm(_Plain):
    """Minus infinity where nothing is right."""

    def value(self, outcome: Outcome) -> tuple[float, ...]:
        (top1,) = _Plain.value(self, outcome)
        return (math.log(top1) if top1 else -math.inf,)


@dataclass(frozen=True, slots=True)
class _BestSoFar(_Plain):
    """Remembers the best outcome it has seen."""

    seen: list[float] = field(default_factory=list)

    def value(self, outcome: Outcome) -> tuple[float, ...]:
        self.seen.extend(_Plain.value(self, outcome))
        return (max(self.seen),)


class _Generous(_Plain):
    """Has a number for outcomes that failed."""

    def value(self, outcome: Outcome) -> tuple[float, ...]:
        return (outcome.metrics.get("top1", 0.0),)


class _Switching(_Plain):
    """Leaves the model in evaluation mode."""

    def measure(self, model: nn.Module, task: Task, split: Split) -> Mapping[str, float]:
        model.eval()
        return {}


class _Usurper(_Plain):
    """Puts its own number in the place of the task's."""

    def measure(self, model: nn.Module, task: Task, split: Split) -> Mapping[str, float]:
        return {"top1": 1.0}


BROKEN: Mapping[str, Callable[[], Reward]] = {
    "test_one_number_and_one_name_per_goal": _TwoNumbers,
    "test_value_is_finite": _Logarithm,
    "test_value_is_pure": _BestSoFar,
    "test_an_outcome_that_is_not_done_is_refused": _Generous,
    "test_measuring_leaves_the_model_alone": _Switching,
    "test_what_was_measured_has_a_value": _Usurper,
}
"""Law to a reward that breaks this law and keeps the others."""
