"""Every regulariser keeps the laws, and every law has a regulariser that breaks it."""

from __future__ import annotations

import pytest

from autopeft.core.contracts import Regulariser
from autopeft.core.registry import Registry
from autopeft.regularisers import BUILTIN
from autopeft.regularisers.consistency import Consistency
from autopeft.regularisers.distillation import Distillation
from autopeft.regularisers.dr_tune import DRTune
from autopeft.regularisers.gradient_dropout import GradientDropout
from autopeft.regularisers.l2_start import L2Start
from autopeft.regularisers.nuclear_norm import NuclearNorm
from autopeft.regularisers.orthogonality import Orthogonality
from autopeft.testing.regulariser_laws import BROKEN, RegulariserLaws

LAWS = sorted(name for name in dir(RegulariserLaws) if name.startswith("test_"))

VARIANTS: dict[str, Regulariser] = {
    "consistency": Consistency(),
    "consistency with the second loss": Consistency(0.5, second=1.0),
    "distillation": Distillation(),
    "dr_tune": DRTune(bank=12, rotate_every=2),
    "dr_tune as released": DRTune(bank=12, rotate_every=2, between="none", combine="pool"),
    "gradient_dropout": GradientDropout(),
    "l2_start": L2Start(),
    "l2_start by sign": L2Start(pull="sign"),
    "nuclear_norm": NuclearNorm(),
    "nuclear_norm of one": NuclearNorm(estimator="one"),
    "orthogonality": Orthogonality(),
    "orthogonality of both": Orthogonality(form="both"),
    "orthogonality to the weight": Orthogonality(form="weight"),
}


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("name", VARIANTS)
def test_builtin(name: str, law: str) -> None:
    class Laws(RegulariserLaws):
        def make(self) -> Regulariser:
            return VARIANTS[name]

    getattr(Laws(), law)()


def test_every_law_has_a_regulariser_that_breaks_it() -> None:
    assert sorted(BROKEN) == LAWS


@pytest.mark.parametrize("broken", LAWS)
def test_a_broken_regulariser_breaks_its_law_alone(broken: str) -> None:
    class Laws(RegulariserLaws):
        def make(self) -> Regulariser:
            return BROKEN[broken]()

    failed = []
    for law in LAWS:
        try:
            getattr(Laws(), law)()
        except AssertionError:
            failed.append(law)
    assert failed == [broken]


def test_the_table_names_the_classes() -> None:
    registry: Registry[Regulariser] = Registry("regulariser", "autopeft.regularisers", BUILTIN)
    assert {name.partition(" ")[0] for name in VARIANTS} == set(registry)
    assert all(type(VARIANTS[name]) is registry[name] for name in registry)
