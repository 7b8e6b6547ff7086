from __future__ import annotations

from collections import Counter

import pytest

from autopeft.errors import UsageError
from autopeft.search.fidelity import Rungs


def test_rungs_by_hand() -> None:
    rungs = Rungs(27, eta=3)
    assert rungs.halvings == 3
    assert [rungs.rungs(b) for b in range(4)] == [(1, 3, 9), (3, 9), (9,), ()]
    assert Rungs(15).rungs(0) == (2, 5)  # 15 / 9 and 15 / 3, rounded
    assert Rungs(100, eta=3, min_epochs=10).rungs(0) == (11, 33)


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_short_schedule_has_no_rung(epochs: int) -> None:
    assert Rungs(epochs).halvings == 0
    assert Rungs(epochs).rungs(0) == ()
    assert [Rungs(epochs).bracket(i) for i in range(4)] == [0, 0, 0, 0]


def test_ladders_are_ladders() -> None:
    for top in range(1, 120):
        for eta in (2, 3, 4):
            for low in (1, 2, 5):
                rungs = Rungs(top, eta, low)
                for bracket in range(rungs.halvings + 1):
                    ladder = rungs.rungs(bracket)
                    assert len(ladder) == rungs.halvings - bracket
                    assert list(ladder) == sorted(set(ladder))
                    assert all(low <= epoch < top for epoch in ladder)


def test_shares_are_hyperbands() -> None:
    # s_max = 3, eta = 3: ceil(4 / 4 * 27), ceil(4 / 3 * 9), ceil(4 / 2 * 3), ceil(4 / 1 * 1) = 27, 12, 6, 4 of 49.
    brackets = [Rungs(27).bracket(i) for i in range(98)]
    assert Counter(brackets[:49]) == {0: 27, 1: 12, 2: 6, 3: 4}
    assert brackets[49:] == brackets[:49]
    assert set(brackets[:8]) == {0, 1, 2, 3}  # no bracket waits for long


@pytest.mark.parametrize(("kwargs", "word"), [({"max_epochs": 0}, "at least 1"), ({"max_epochs": 9, "eta": 1}, "eta")])
def test_no_ladder(kwargs: dict[str, int], word: str) -> None:
    with pytest.raises(UsageError, match=word):
        Rungs(**kwargs)


def test_unknown_bracket() -> None:
    with pytest.raises(UsageError, match="0 to 2"):
        Rungs(9).rungs(3)
