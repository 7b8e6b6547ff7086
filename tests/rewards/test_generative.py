"""Rewards about images that the model makes, on a task whose answers are known."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autopeft.core.contracts import Reward, Task
from autopeft.core.outcome import Outcome
from autopeft.errors import UsageError
from autopeft.rewards._copies import amd, extracted, memorisation_penalty
from autopeft.rewards._features import features
from autopeft.rewards._frechet import fid
from autopeft.rewards._mmd import gaussian_mmd, polynomial_mmd
from autopeft.rewards.amd import AMD
from autopeft.rewards.cmmd import CMMD
from autopeft.rewards.extraction import Extraction
from autopeft.rewards.fid import FID
from autopeft.rewards.joint import Joint
from autopeft.rewards.kid import KID
from autopeft.rewards.metric import Metric
from autopeft.rewards.mifid import MiFID
from autopeft.rewards.noise_difference import NoiseDifference
from autopeft.rewards.parameters import Parameters
from autopeft.testing.reward_laws import RewardLaws
from autopeft.testing.toy_generator import ToyGenerator
from autopeft.testing.toy_task import ToyTask


def a_model() -> nn.Module:
    return RewardLaws().model()


class GenerativeLaws(RewardLaws):
    make: Callable[[], Reward]

    def reward(self) -> Reward:
        return type(self).make()

    def task(self) -> Task:
        return ToyGenerator()

    def outcomes(self) -> list[Outcome]:
        return [Outcome("done", dict.fromkeys(self.reward().names, v), trainable=9) for v in (0.0, 0.5, 2.0)]


class TestFID(GenerativeLaws):
    make = staticmethod(lambda: FID(samples=24))


class TestFIDInfinity(GenerativeLaws):
    make = staticmethod(lambda: FID(samples=24, infinity=True))


class TestKID(GenerativeLaws):
    make = staticmethod(lambda: KID(samples=24))


class TestCMMD(GenerativeLaws):
    make = staticmethod(lambda: CMMD(samples=24))


class TestMiFID(GenerativeLaws):
    make = staticmethod(lambda: MiFID(samples=24))


class TestAMD(GenerativeLaws):
    make = staticmethod(lambda: AMD(samples=24))


class TestExtraction(GenerativeLaws):
    make = staticmethod(lambda: Extraction(samples=24))


class TestNoiseDifference(GenerativeLaws):
    make = staticmethod(lambda: NoiseDifference(draws=2))


class TestJoint(GenerativeLaws):
    make = staticmethod(lambda: Joint((FID(samples=24), AMD(samples=24, space="pixels"), Parameters())))


def made(task: ToyGenerator, n: int, seed: int = 0) -> Tensor:
    with torch.no_grad():
        return task.sample(a_model().eval(), n, seed)


def test_numbers_are_those_of_the_mathematics() -> None:
    task, n = ToyGenerator(0.8), 24
    generated, real, training = made(task, n), task.images("outer"), task.training_images()
    f, r, t = (features(x) for x in (generated, real, training))
    mmd, cmmd = polynomial_mmd(f, r), gaussian_mmd(f, r, 10.0)
    penalty = memorisation_penalty(f, t)
    expected: dict[Reward, dict[str, float]] = {
        FID(samples=n): {"fid": fid(f, r), "fid_samples": n},
        KID(samples=n): {"kid": mmd.value, "kid_error": mmd.error},
        CMMD(samples=n): {"cmmd": 1000 * cmmd.value, "cmmd_error": 1000 * cmmd.error},
        MiFID(samples=n): {"mifid": fid(f, r) * penalty, "mifid_penalty": penalty},
        AMD(samples=n): {"amd": amd(f, t)},
        AMD(samples=n, space="pixels", distance="l2"): {"amd_pixels_l2": amd(generated, training, "l2")},
        Extraction(samples=n): {"extracted": extracted(generated, training, 0.2)},
    }
    for reward, numbers in expected.items():
        assert dict(reward.measure(a_model(), task, "outer")) == pytest.approx(numbers, rel=1e-6)


def test_copying_shows_in_every_measure_of_memorisation() -> None:
    shy, thief = ToyGenerator(0.0), ToyGenerator(1.0)

    def of(reward: Reward, task: Task) -> float:
        return reward.measure(a_model(), task, "outer")[reward.names[0]]

    for space in ("features", "pixels"):
        for distance in ("cosine", "l2"):
            reward = AMD(samples=60, space=space, distance=distance)  # type: ignore[arg-type]
            assert reward.goals == ("maximize",)
            assert of(reward, thief) == pytest.approx(0.0, abs=1e-6)
            assert of(reward, shy) > 0.01
    assert of(Extraction(samples=60), shy) == 0 < of(Extraction(samples=60), thief)
    penalised = MiFID(samples=60).measure(a_model(), thief, "outer")
    assert penalised["mifid_penalty"] == pytest.approx(1e6)


def test_infinity_is_below_fid_and_says_how_sure_it_is() -> None:
    found = FID(samples=64, infinity=True).measure(a_model(), ToyGenerator(0.5), "outer")
    assert found["fid_infinity"] < found["fid"]
    assert found["fid_error"] > 0
    # Where the bias, the difference, is below a twentieth of the value.
    slope = found["fid_needed"] * 0.05 * abs(found["fid_infinity"])
    assert found["fid"] - found["fid_infinity"] == pytest.approx(slope / 64, rel=0.5)


def test_draws_are_fixed_and_the_batch_does_not_matter() -> None:
    task = ToyGenerator(planted=(1, 5))
    reward = NoiseDifference(draws=3, seed=2)
    found = reward.measure(a_model(), task, "outer")
    assert dict(found) == dict(reward.measure(a_model(), task, "inner"))
    with torch.no_grad():
        norms = task.noise_difference(a_model().eval(), (1, 5), 3, 2).mean(1)
        everything = task.noise_difference(a_model().eval(), None, 3, 2).mean(1)
    assert found["noise_difference_max"] == pytest.approx(float(norms.max()))
    assert found["noise_difference_mean"] == pytest.approx(float(norms.mean()))
    whole = NoiseDifference("mean", draws=3, seed=2, rows="all")
    assert whole.measure(a_model(), task, "outer")["noise_difference_mean"] == pytest.approx(float(everything.mean()))
    assert whole.names == ("noise_difference_mean",)


def test_a_joint_reward_makes_images_once() -> None:
    class Counting(ToyGenerator):
        calls = 0

        def sample(self, model: nn.Module, n: int, seed: int, labels: Tensor | None = None) -> Tensor:
            type(self).calls += 1
            return super().sample(model, n, seed, labels)

    parts = (FID(samples=24), KID(samples=24), AMD(samples=24), Extraction(samples=24), Metric("nll", "minimize"))
    reward = Joint(parts)
    assert reward.names == ("fid", "kid", "amd", "extracted", "nll")
    assert reward.goals == ("minimize", "minimize", "maximize", "minimize", "minimize")
    task = Counting()
    found = reward.measure(a_model(), task, "outer")
    assert Counting.calls == 1
    alone = [part.measure(a_model(), task, "outer") for part in parts]
    assert dict(found) == {name: value for measured in alone for name, value in measured.items()}
    outcome = Outcome("done", {**found, "nll": 0.5})
    assert reward.value(outcome) == (*(found[n] for n in reward.names[:4]), 0.5)


def test_parts_must_not_contradict_each_other() -> None:
    with pytest.raises(UsageError, match="both give fid"):
        Joint((FID(samples=24), FID(samples=32)))
    with pytest.raises(UsageError, match="at least one part"):
        Joint(())
    clash = Joint((FID(samples=24), FID(samples=32, infinity=True)))
    with pytest.raises(UsageError, match="measure fid as"):
        clash.measure(a_model(), ToyGenerator(), "outer")


def test_other_tasks_are_refused() -> None:
    with pytest.raises(UsageError, match="ToyTask makes no images"):
        FID().measure(a_model(), ToyTask(), "outer")
    with pytest.raises(UsageError, match="ToyTask has no `noise_difference`"):
        NoiseDifference().measure(a_model(), ToyTask(), "outer")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FID(samples=2), "at least 3"),
        (lambda: FID(seed=-1), "seed"),
        (lambda: FID(samples=8, infinity=True), "at least 16"),
        (lambda: FID(tolerance=0.0), "tolerance"),
        (lambda: CMMD(sigma=0.0), "sigma"),
        (lambda: MiFID(threshold=0.0), "threshold"),
        (lambda: AMD(space="sound"), "'sound'"),  # type: ignore[arg-type]
        (lambda: AMD(distance="l1"), "'l1'"),  # type: ignore[arg-type]
        (lambda: AMD(rows="few"), "'few'"),  # type: ignore[arg-type]
        (lambda: Extraction(threshold=-1.0), "threshold"),
        (lambda: Extraction(clique=0), "clique"),
        (lambda: NoiseDifference("sum"), "'sum'"),  # type: ignore[arg-type]
        (lambda: NoiseDifference(draws=0), "draws"),
    ],
)
def test_bad_settings_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()


def test_a_task_that_gives_too_few_images_is_caught() -> None:
    class Short(ToyGenerator):
        def sample(self, model: nn.Module, n: int, seed: int, labels: Tensor | None = None) -> Tensor:
            return super().sample(model, n - 1, seed, labels)

    with pytest.raises(UsageError, match="asked for 24 images"):
        FID(samples=24).measure(a_model(), Short(), "outer")


def test_every_number_is_finite() -> None:
    for fidelity in (0.0, 1.0):
        for reward in (FID(samples=24, infinity=True), MiFID(samples=24), CMMD(samples=24), AMD(samples=24)):
            found = reward.measure(a_model(), ToyGenerator(fidelity), "outer")
            assert all(math.isfinite(v) for v in found.values()), found
