from __future__ import annotations

import numpy as np
import pytest

from autopeft.allocation.hull import on_hull
from autopeft.core.budget import Budget, Cost
from autopeft.core.menu import Option
from autopeft.core.site import Place


def curve(points: list[tuple[int, float]], site: str = "a", method: str = "m") -> list[Option]:
    return [
        Option(site, method, size, Cost.plain(cost, cost), gain, (Place(site, "weight"),))
        for size, (cost, gain) in enumerate(points, 1)
    ]


def kept(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    return [(o.cost.trainable, o.gain) for o in on_hull(curve(points), Budget(100))]


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        # Slopes 3, then 1 to (4, 5): (2, 3.5) lies above the line from (1, 3) to (4, 5), (3, 4) below it.
        ([(1, 3.0), (2, 3.9), (3, 4.0), (4, 5.0)], [(1, 3.0), (2, 3.9), (4, 5.0)]),
        # On a line from nothing only the end is a vertex; a dip below it goes as well.
        ([(1, 1.0), (2, 2.0), (3, 3.0)], [(3, 3.0)]),
        ([(1, 0.5), (4, 4.0)], [(4, 4.0)]),
        # More for nothing, and what loses.
        ([(1, 2.0), (2, 2.0), (3, 1.0)], [(1, 2.0)]),
        ([(1, -1.0), (2, 0.0)], []),
    ],
)
def test_hand_worked(points: list[tuple[int, float]], expected: list[tuple[int, float]]) -> None:
    assert kept(points) == expected


def test_every_price_buys_a_vertex() -> None:
    """Brute force over prices: the option of largest `gain - price * cost` is kept, and every kept one is so bought."""
    rng = np.random.default_rng(0)
    for _ in range(30):
        costs = np.sort(rng.choice(np.arange(1, 40), 9, replace=False))
        points = [(int(c), float(g)) for c, g in zip(costs, rng.uniform(-1, 5, 9), strict=True)]
        bought = set()
        for price in np.geomspace(1e-4, 10, 4000):
            best = max(points, key=lambda p: p[1] - price * p[0])
            if best[1] - price * best[0] > 0:
                bought.add(best)
        assert bought <= set(kept(points))
        assert len(set(kept(points)) - bought) <= 1, "a vertex that only a sliver of prices buys"


def test_places_are_apart_and_order_does_not_matter() -> None:
    options = curve([(1, 1.0), (2, 3.0)], "a") + curve([(1, 2.0), (2, 3.0)], "b") + curve([(1, 9.0)], "a", "n")
    found = on_hull(options, Budget(9))
    assert {(o.site, o.method, o.size) for o in found} == {("a", "m", 2), ("b", "m", 1), ("b", "m", 2), ("a", "n", 1)}
    assert on_hull(options[::-1], Budget(9)) == found
