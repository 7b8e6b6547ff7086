from __future__ import annotations

import pytest

from autopeft.core.contracts import Scorer
from autopeft.scoring.calibrated import Calibrated
from autopeft.scoring.eva import EVA
from autopeft.scoring.fisher import Fisher
from autopeft.scoring.gradient import Gradient
from autopeft.scoring.grasp import GraSP
from autopeft.scoring.magnitude import Magnitude
from autopeft.scoring.nvit import NViT
from autopeft.scoring.random import Random
from autopeft.scoring.sensitivity import Sensitivity
from autopeft.scoring.snip import SNIP
from autopeft.testing.scorer_laws import BROKEN, ScorerLaws

LAWS = [name for name in dir(ScorerLaws) if name.startswith("test_")]


class TestGradient(ScorerLaws):
    def make(self) -> Scorer:
        return Gradient()


class TestGradientOfHalves(ScorerLaws):
    def make(self) -> Scorer:
        return Gradient(batch_size=3, halves=True, max_samples=20, order="file")


class TestGradientPerSample(ScorerLaws):
    def make(self) -> Scorer:
        return Gradient(mode="per_sample", batch_size=16, chunk=3)


class TestGradientInBfloat16(ScorerLaws):
    def make(self) -> Scorer:
        return Gradient(halves=True, amp="bf16")


class TestGradientPerSampleInBfloat16(ScorerLaws):
    models = ("vit",)

    def make(self) -> Scorer:
        return Gradient(mode="per_sample", amp="bf16")


class TestFisher(ScorerLaws):
    def make(self) -> Scorer:
        return Fisher()


class TestFisherPerSample(ScorerLaws):
    models = ("vit",)

    def make(self) -> Scorer:
        return Fisher(Gradient(mode="per_sample", halves=True), power=1.0)


class TestCalibrated(ScorerLaws):
    def make(self) -> Scorer:
        return Calibrated()


class TestCalibratedOfFiniteSteps(ScorerLaws):
    models = ("vit",)

    def make(self) -> Scorer:
        return Calibrated(Gradient(batch_size=3, blocks=False), preconditioner="diagonal", reach=0.1, folds=0)


class TestCalibratedWithTheGap(ScorerLaws):
    def make(self) -> Scorer:
        return Calibrated(Gradient(batch_size=4), memory="gap")


class TestCalibratedWithAMeasure(ScorerLaws):
    def make(self) -> Scorer:
        return Calibrated(Gradient(batch_size=3), folds=0, memory="noise_difference")


class TestSNIP(ScorerLaws):
    def make(self) -> Scorer:
        return SNIP()


class TestNViT(ScorerLaws):
    def make(self) -> Scorer:
        return NViT()


class TestSensitivity(ScorerLaws):
    def make(self) -> Scorer:
        return Sensitivity()


class TestGraSP(ScorerLaws):
    def make(self) -> Scorer:
        return GraSP()


class TestEVA(ScorerLaws):
    def make(self) -> Scorer:
        return EVA()


class TestMagnitude(ScorerLaws):
    sensitive = False

    def make(self) -> Scorer:
        return Magnitude()


class TestRandom(ScorerLaws):
    sensitive = False

    def make(self) -> Scorer:
        return Random()


def test_there_is_a_broken_scorer_for_every_law() -> None:
    assert sorted(BROKEN) == LAWS


@pytest.mark.parametrize("law", sorted(BROKEN))
def test_a_broken_scorer_fails_its_law_and_no_other(law: str) -> None:
    class Laws(ScorerLaws):
        models = ("vit",)

        def make(self) -> Scorer:
            return BROKEN[law]()

    failed = []
    for name in LAWS:
        try:
            getattr(Laws(), name)()
        except AssertionError:
            failed.append(name)
    assert failed == [law]
