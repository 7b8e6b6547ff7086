"""Rewards about size, speed, calibration and what was forgotten."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from autopeft.core.contracts import Reward
from autopeft.core.outcome import Outcome
from autopeft.errors import UsageError
from autopeft.rewards.calibration import Calibration
from autopeft.rewards.denoising_loss import DenoisingLoss
from autopeft.rewards.forgetting import Forgetting
from autopeft.rewards.latency import Latency
from autopeft.rewards.parameters import Parameters
from autopeft.rewards.size import Bytes
from autopeft.tasks.classification import Classification
from autopeft.testing.reward_laws import RewardLaws
from autopeft.testing.toy_task import ToyTask


class MeasuredLaws(RewardLaws):
    def outcomes(self) -> list[Outcome]:
        return [Outcome("done", dict.fromkeys(self.reward().names, v), trainable=9) for v in (0.0, 0.5, 2.0)]


class TestParameters(MeasuredLaws):
    def reward(self) -> Reward:
        return Parameters()


class TestBytes(MeasuredLaws):
    def reward(self) -> Reward:
        return Bytes()


class TestLatency(MeasuredLaws):
    def reward(self) -> Reward:
        return Latency(repeats=3)


class TestCalibration(MeasuredLaws):
    def reward(self) -> Reward:
        return Calibration()


def test_parameters_are_those_of_the_outcome() -> None:
    assert Parameters().value(Outcome("done", {"top1": 0.5}, trainable=1234)) == (1234.0,)
    assert Parameters().goals == ("minimize",)


def test_bytes_count_what_is_trained_once() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2).half())
    model[0].bias.requires_grad_(False)
    model.append(nn.Linear(3, 3))
    model[2].weight = model[0].weight
    # 9 shared weights and 3 biases of 4 bytes, 6 + 2 of 2 bytes.
    assert Bytes().measure(model, ToyTask(), "outer") == {"bytes": 4 * 12 + 2 * 8}


def test_latency_is_more_for_a_model_that_takes_longer() -> None:
    class Slow(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(400):
                torch.mm(self.weight, self.weight.T)
            return super().forward(x)

    quick, slow = (
        Latency(repeats=5).measure(nn.Sequential(nn.Flatten(), head), ToyTask(), "outer")["latency_ms"]
        for head in (nn.Linear(192, 4), Slow(192, 4))
    )
    assert 0 < 2 * quick < slow


class Fixed(ToyTask):
    """Answers and truths that are given."""

    def __init__(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        super().__init__()
        self.answers = logits, labels

    def predict(self, model: nn.Module, split: str) -> tuple[torch.Tensor, torch.Tensor]:
        return self.answers


def test_calibration_hand_worked() -> None:
    confidence = torch.tensor([0.6, 0.7, 0.8, 0.9])
    logits = torch.stack([confidence.log(), (1 - confidence).log()], dim=1)
    task = Fixed(logits, torch.tensor([0, 1, 0, 0]))
    # Two bins of two: right 1 of 2 at a mean confidence of 0.65, and 2 of 2 at 0.85: (0.3 + 0.3) / 4.
    found = Calibration(bins=2).measure(nn.Linear(1, 1), task, "outer")["adaptive_ece"]
    assert found == pytest.approx(0.15, abs=1e-6)
    # One bin: 3 right against 3.0 confident. One bin per sample: every gap for itself.
    assert Calibration(bins=1).measure(nn.Linear(1, 1), task, "outer")["adaptive_ece"] == pytest.approx(0, abs=1e-6)
    alone = Calibration(bins=9).measure(nn.Linear(1, 1), task, "outer")["adaptive_ece"]
    assert alone == pytest.approx((0.4 + 0.7 + 0.2 + 0.1) / 4)


def test_calibration_needs_a_classifier() -> None:
    task = Fixed(torch.zeros(4, 1), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(UsageError, match="of a classifier"):
        Calibration().measure(nn.Linear(1, 1), task, "outer")


def test_denoising_loss_is_the_tasks_own() -> None:
    outcome = Outcome("done", {"denoising_loss": 0.25})
    assert DenoisingLoss().value(outcome) == (0.25,)
    assert DenoisingLoss().measure(nn.Linear(1, 1), ToyTask(), "outer") == {}


class Pixels(nn.Module):
    """Features are the pixels, or what is left of them; the classifier knows another number of classes."""

    def __init__(self, keep: float) -> None:
        super().__init__()
        self.keep = keep
        self.head = nn.Linear(192, 3)

    def get_classifier(self) -> nn.Module:
        return self.head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1)
        rest: torch.Tensor = self.head(torch.cat([self.keep * x[:, :1], x[:, 1:] * self.keep + (1 - self.keep)], dim=1))
        return rest


class ToySpec(Classification):
    """Opens patterns that are easy to tell apart."""

    def open(self, *_: Any, **__: Any) -> ToyTask:
        return ToyTask(noise=0.3, classes=4)


def test_forgetting_is_the_error_of_class_means() -> None:
    reward = Forgetting("patterns", ToySpec())
    assert reward.measure(Pixels(1.0), ToyTask(), "outer")["forgetting"] == 0.0
    # Features that are the same for every image leave one guess for four classes.
    assert reward.measure(Pixels(0.0), ToyTask(), "outer")["forgetting"] == pytest.approx(0.75)


def test_forgetting_without_a_classifier_is_the_source_tasks_loss() -> None:
    class Bare(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1)[:, :4]

    model, task = Bare(nn.Conv2d(1, 1, 1)), ToyTask(noise=0.3, classes=4)
    expected = torch.cat([task.losses(model, batch) for batch in task.batches("outer")]).mean()
    found = Forgetting("patterns", ToySpec()).measure(model, ToyTask(), "outer")["forgetting"]
    assert found == pytest.approx(float(expected))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Latency(repeats=2),
        lambda: Latency(batch_size=0),
        lambda: Calibration(bins=0),
        lambda: Forgetting(" ", Classification()),
        lambda: Forgetting("digits", Classification(), max_samples=1),
    ],
)
def test_bad_settings_are_refused(make: Callable[[], Reward]) -> None:
    with pytest.raises(UsageError):
        make()
