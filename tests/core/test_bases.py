from __future__ import annotations

import numpy as np
import pytest

from autopeft.core.allocation import Allocation
from autopeft.core.bases import Bases
from autopeft.core.budget import Budget, Cost
from autopeft.core.menu import Option
from autopeft.core.site import Place


def bases(value: float = 1.0) -> Bases:
    return Bases(np.full((3, 2), value, np.float32), np.ones((4, 2), np.float32))


def test_equal_values_are_equal_and_frozen() -> None:
    assert bases() == bases()
    assert hash(bases()) == hash(bases())
    assert bases() != bases(2.0)
    with pytest.raises(ValueError, match="read-only"):
        bases().left[0, 0] = 1


def test_digest_knows_the_shape() -> None:
    flat = Bases(np.ones((2, 3), np.float32), np.ones((4, 2), np.float32))
    assert flat.sha256 != bases().sha256


@pytest.mark.parametrize("left", [np.ones((3, 2)), np.ones(3, np.float32), np.ones((3, 2), np.int32)])
def test_other_types_are_refused(left: np.ndarray) -> None:
    with pytest.raises(ValueError, match="2-D float32"):
        Bases(left, np.ones((4, 2), np.float32))


def test_a_plan_knows_its_bases() -> None:
    def plan(chosen: Bases | None) -> Allocation:
        option = Option("a", "core", 2, Cost.plain(4, 12), 1.0, (Place("a", "weight"),), None, chosen)
        return Allocation((option,), Budget(10))

    assert plan(bases()).digest == plan(bases()).digest
    assert len({plan(bases()).digest, plan(bases(2.0)).digest, plan(None).digest}) == 3
