from __future__ import annotations

import itertools
import random

import pytest

from autopeft.core.goals import Goals
from autopeft.errors import UnknownKey, UsageError

TWO = Goals(("top1", "memorised"), ("maximize", "minimize"))


def test_what_auto_comes_to() -> None:
    assert Goals(("top1",), ("maximize",)).mode == "first"
    assert TWO.mode == "pareto"
    assert TWO.searched == ("maximize", "minimize")
    limited = Goals(("top1", "memorised"), ("maximize", "minimize"), limits={"memorised": 0.2})
    assert limited.mode == "epsilon"
    assert limited.searched == ("maximize",)
    assert Goals(("a", "b"), ("maximize", "minimize"), "first").searched == ("maximize",)


def test_limits_point_the_way_of_their_goal() -> None:
    goals = Goals(("top1", "memorised"), ("maximize", "minimize"), limits={"memorised": 0.2, "top1": 0.8})
    assert goals.violations((0.7, 0.5)) == pytest.approx({"top1": 0.1, "memorised": 0.3})
    assert goals.violation((0.7, 0.5)) == pytest.approx(0.4)
    assert goals.violation((0.9, 0.1)) == 0.0


def test_what_keeps_to_the_limits_comes_first_then_the_first_goal() -> None:
    goals = Goals(("top1", "memorised"), ("maximize", "minimize"), limits={"memorised": 0.2})
    results = [(0.95, 0.5), (0.80, 0.2), (0.85, 0.1), (0.99, 0.21)]
    assert goals.choose(results) == 2
    # Nothing keeps to the limit: the least violation.
    assert goals.choose([(0.95, 0.5), (0.80, 0.3), (0.85, 0.4)]) == 1
    assert Goals(("nll",), ("minimize",)).choose([(0.3,), (0.2,), (0.2,)]) == 1


def test_the_front_by_hand() -> None:
    results = [(0.9, 0.5), (0.8, 0.6), (0.7, 0.1), (0.9, 0.5), (0.85, 0.3)]
    assert TWO.on_front(results) == (0, 2, 4)


def test_the_front_equals_brute_force() -> None:
    """A result is on the front exactly when no other is at least as good in all goals and better in one."""
    draw = random.Random(0)
    goals = Goals(("a", "b", "c"), ("maximize", "minimize", "maximize"))
    results = [tuple(draw.randint(0, 4) for _ in range(3)) for _ in range(60)]
    signed = [(a, -b, c) for a, b, c in results]
    beaten = {
        i
        for i, j in itertools.permutations(range(60), 2)
        if all(y >= x for x, y in zip(signed[i], signed[j], strict=True)) and signed[i] != signed[j]
    }
    expected = [i for i in range(60) if i not in beaten and results.index(results[i]) == i]
    assert list(goals.on_front(results)) == expected


def test_the_knee_by_hand() -> None:
    # Scaled: (0, 1), (0.75, 0.75), (1, 0): sums 1, 1.5, 1.
    results = [(0.5, 0.0), (0.8, 0.25), (0.9, 1.0), (0.1, 0.9)]
    assert TWO.choose(results) == 1
    # One end is much better than what the other costs: the corner itself.
    assert TWO.choose([(0.9, 0.3)]) == 0
    with pytest.raises(UsageError, match="no result"):
        TWO.choose([])


def test_a_limit_on_a_front_chooses_on_it() -> None:
    goals = Goals(("top1", "memorised"), ("maximize", "minimize"), "pareto", {"memorised": 0.2})
    assert goals.searched == ("maximize", "minimize")
    assert goals.choose([(0.5, 0.0), (0.6, 0.2), (0.9, 1.0)]) == 1


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: Goals((), ()), UsageError, "0 names"),
        (lambda: Goals(("a",), ("up",)), UsageError, "maximize or minimize, got 'up'"),
        (lambda: Goals(("a",), ("maximize",), "best"), UsageError, "search.front must be one of"),  # type: ignore[arg-type]
        (lambda: Goals(("a",), ("maximize",), limits={"b": 1.0}), UnknownKey, "no goal 'b'; the reward's are a"),
        (lambda: Goals(("a",), ("maximize",), limits={"a": float("nan")}), UsageError, "search.limits.a"),
        (lambda: Goals(("a",), ("maximize",), "epsilon"), UsageError, "needs a limit"),
    ],
)
def test_what_makes_no_sense_is_refused(make: object, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        make()  # type: ignore[operator]
