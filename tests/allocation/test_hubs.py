"""Options of groups of sites: decided hub by hub, against enumeration and milp."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from itertools import product

import numpy as np
import pytest

from autopeft.allocation import _forest, _groups, _hubs
from autopeft.allocation._milp import Programme
from autopeft.allocation.knapsack import Knapsack
from autopeft.core.allocation import Allocation
from autopeft.core.budget import Budget, Cost
from autopeft.core.menu import Menu, Option
from autopeft.core.site import Place
from autopeft.testing.oracles import best_by_enumeration, random_menu


def group_menu(seed: int, blocks: int, sizes: int, largest: int = 12, integers: bool = False) -> Menu:
    """Four matrices per block with weights and biases; options on each, and on blocks, roles and everything."""
    rng = np.random.default_rng(seed)
    roles = ("qkv", "proj", "fc1")
    options: list[Option] = []

    def add(site: str, method: str, places: list[Place], most: int, worth: float) -> None:
        costs = np.unique(rng.integers(1, largest * len(places), most))
        for size, cost in enumerate(costs.tolist(), 1):
            gain = worth * math.sqrt(cost) * rng.uniform(0.6, 1.2)
            gain = float(round(gain)) if integers else gain
            options.append(Option(site, method, size, Cost.plain(cost, cost), gain, tuple(sorted(places))))

    names = {(b, r): f"b{b}.{r}" for b, r in product(range(blocks), roles)}
    for name in names.values():
        add(name, "matrix", [Place(name, "weight")], sizes, rng.uniform(0.5, 2))
        add(name, "bias", [Place(name, "bias")], sizes, rng.uniform(0.2, 1))
    for b in range(blocks):
        inside = [names[b, r] for r in roles]
        add(f"block:{b}", "all-biases", [Place(n, "bias") for n in inside], 2, rng.uniform(0.5, 2))
        add(f"block:{b}", "attention", [Place(n, "weight") for n in inside[:2]], 2, rng.uniform(0.5, 3))
    for r in roles:
        add(f"*:{r}", "shared", [Place(names[b, r], "weight") for b in range(blocks)], sizes, rng.uniform(0.5, 3))
    add("*", "everything", [Place(n, "weight") for n in names.values()], sizes, rng.uniform(1, 4))
    return Menu(tuple(options))


def solved(menu: Menu, limit: int, **settings: float) -> tuple[float, _hubs.HubPacking]:
    """Gain and packing, once it is sure that the packing is a plan."""
    options = menu.options
    costs = np.array([o.cost.trainable for o in options], dtype=np.int64)
    gains = np.array([o.gain for o in options], dtype=np.float64)
    found = _hubs.solve(options, costs, gains, limit, **settings)
    assert found is not None
    chosen = [options[i] for i in found.chosen]
    places = [place for o in chosen for place in o.places]
    assert len(set(places)) == len(places)
    assert sum(o.cost.trainable for o in chosen) <= limit
    return math.fsum(o.gain for o in chosen), found


def check_against_enumeration() -> None:
    """Menus of groups and menus of any shape, with ties, free room and budgets that buy nothing."""
    for seed in range(40):
        menu = group_menu(seed, blocks=2, sizes=1, integers=seed % 2 == 0)
        for limit in (4, 17, 40):
            best = best_by_enumeration(menu, Budget(limit))
            gain, found = solved(menu, limit)
            assert gain == pytest.approx(best, rel=1e-12, abs=1e-12), (seed, limit)
            assert found.bound == pytest.approx(gain, rel=1e-9, abs=1e-12), (seed, limit)
    for seed in range(120):
        menu, limit = random_menu(seed, integers=seed % 3 != 0), (0, 3, 8, 14, 20, 37)[seed % 6]
        best = best_by_enumeration(menu, Budget(limit))
        assert solved(menu, limit)[0] == pytest.approx(best, rel=1e-12, abs=1e-12), (seed, limit)


@pytest.mark.parametrize("small", [0, _hubs._SMALL])
def test_equals_enumeration(small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By enumerating what is left of a component, and by deciding everything hub by hub."""
    monkeypatch.setattr(_hubs, "_SMALL", small)
    check_against_enumeration()


def _ignores_all_rivals(self: _forest.Forest, cells: int) -> list[int]:
    """Bug 1: takes all options for compatible."""
    return [1 << i for i in _forest.bits(cells)]


def _takes_the_best_at_the_price(forest: object, priced: object, floor: float) -> list[object]:
    """Bug 2: takes the plan that the price leads to for the best one."""
    return []


def _no_slack(forest: _forest.Forest, priced: _forest.Priced, i: int, slack: float, limit: int) -> object:
    """Bug 3: in small components, keeps what is best at the price alone."""
    return _pieces(forest, priced, i, 0.0, limit)


_pieces = _hubs._pieces
BUGS: dict[str, tuple[object, str, Callable[..., object]]] = {
    "rivals": (_forest.Forest, "split", _ignores_all_rivals),
    "proof": (_hubs, "_plans", _takes_the_best_at_the_price),
    "slack": (_hubs, "_pieces", _no_slack),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    where, name, broken = BUGS[bug]
    monkeypatch.setattr(where, name, broken)
    with pytest.raises(AssertionError):
        check_against_enumeration()


def test_equals_milp_on_larger_menus(by_milp: Callable[..., Allocation]) -> None:
    for seed in range(4):
        menu = group_menu(seed, blocks=8, sizes=6, largest=60)
        for limit in (60, 500):
            theirs = by_milp(menu, Budget(limit))
            gain, found = solved(menu, limit)
            assert gain == pytest.approx(theirs.gain, rel=1e-9)
            assert found.bound == pytest.approx(gain, rel=1e-9)


def test_hand_worked() -> None:
    """Of two sites at 3 each or both together at 4: at 4 the pair gains 5, at 6 the two gain 6, at 3 the first."""

    def option(site: str, cost: int, gain: float, *names: str) -> Option:
        return Option(site, "m", 1, Cost.plain(cost, cost), gain, tuple(Place(n, "weight") for n in names))

    menu = Menu((option("a", 3, 3.5, "a"), option("b", 3, 2.5, "b"), option("*", 4, 5.0, "a", "b")))
    for limit, gain in ((3, 3.5), (4, 5.0), (6, 6.0)):
        assert solved(menu, limit)[0] == gain
    assert solved(menu, 100)[1].price == 0.0
    # At 5 units the lines of `*` (5 for 4) and of both (6 for 6) meet at a price of 1/2: no plan gains over 5.5.
    stopped = solved(menu, 5, gap=0.5)[1]
    assert stopped.price == pytest.approx(0.5)
    assert 5.0 <= stopped.bound <= 5.5


def test_the_knapsack_comes_here_before_milp(
    by_milp: Callable[..., Allocation], monkeypatch: pytest.MonkeyPatch
) -> None:
    menu, budget = group_menu(3, blocks=6, sizes=5, largest=60), Budget(300)
    exact = by_milp(menu, budget)
    monkeypatch.setattr(_groups, "_MAX_SETS", 3)
    packed: list[int] = []
    pack = Programme.solve
    monkeypatch.setattr(Programme, "solve", lambda *a, **k: packed.append(1) or pack(*a, **k))
    plan = Knapsack().allocate(menu, budget)
    assert not packed
    assert plan.gain == pytest.approx(exact.gain, rel=1e-9)
    assert plan.provenance.bound == plan.gain
    assert plan.provenance.price == pytest.approx(exact.provenance.price, rel=0.5)
    monkeypatch.setattr(_forest, "_MAX_NODES", 3)
    assert Knapsack().allocate(menu, budget).gain == pytest.approx(exact.gain, rel=1e-9)
    assert packed


def test_a_time_limit_leaves_a_feasible_plan_and_a_valid_bound() -> None:
    menu = group_menu(5, blocks=8, sizes=8, largest=90)
    exact, _ = solved(menu, 700)
    gain, found = solved(menu, 700, seconds=1e-9)
    assert 0 < gain <= exact * (1 + 1e-12)
    assert found.bound >= exact * (1 - 1e-12)


def test_nothing_is_bought_where_nothing_is_worth_it() -> None:
    assert _hubs.solve((), np.zeros(0, np.int64), np.zeros(0), 5) == _hubs.HubPacking((), 0.0, 0.0)


def vit_b_menu(seed: int) -> Menu:
    """12 blocks; a concave curve of 24 sizes on every weight, 8 on every bias, and every kind of group over them."""
    rng = np.random.default_rng(seed)
    shapes = {"qkv": (2304, 768), "proj": (768, 768), "fc1": (3072, 768), "fc2": (768, 3072)}
    options: list[Option] = []

    def add(site: str, method: str, costs: list[int], top: float, places: list[Place]) -> None:
        bend = rng.uniform(0.2, 0.7)
        for size, cost in enumerate(costs, 1):
            gain = top * (cost / costs[-1]) ** bend
            options.append(Option(site, method, size, Cost.plain(cost, cost), gain, tuple(sorted(places))))

    weights: dict[str, list[Place]] = {role: [] for role in shapes}
    for block in range(12):
        biases, held = [], 0.0
        for role, (out, in_) in shapes.items():
            name, energy = f"blocks.{block}.{role}", math.exp(rng.normal(0, 1))
            add(name, "core", [a * a for a in range(1, 17)], energy, [Place(name, "weight")])
            add(name, "lora", [r * (out + in_) for r in range(1, 9)], energy * 1.5, [Place(name, "weight")])
            bias = energy * rng.uniform(0.05, 0.3)
            add(name, "entries", [out >> k for k in range(7, -1, -1)], bias, [Place(name, "bias")])
            weights[role].append(Place(name, "weight"))
            biases.append(Place(name, "bias"))
            held += bias
        add(f"block:{block}", "diffit", [6914], held * rng.uniform(0.8, 1.4), biases)
    for role, places in weights.items():
        add(f"*:{role}", "shared", [a * a for a in range(1, 17)], rng.uniform(0.5, 4), places)
    everything = [place for places in weights.values() for place in places]
    add("*", "fact", [1536 * r + 144 * r * r for r in (1, 2, 4, 8, 16)], rng.uniform(20, 120), everything)
    return Menu(tuple(options))


def test_the_menu_of_a_vit_b_with_groups_is_solved_to_optimality(by_milp: Callable[..., Allocation]) -> None:
    budget = Budget(85_798)
    used = set()
    for seed in range(4):
        menu = vit_b_menu(seed)
        started = time.process_time()
        plan = Knapsack().allocate(menu, budget)
        # HiGHS takes 10 s of a menu of a real ViT-B; measured here: 0.1 s.
        assert time.process_time() - started < 2.0
        assert plan.provenance.bound == plan.gain
        used |= {o.method for o in plan}
    assert {"fact", "diffit", "core", "lora"} <= used
    theirs = by_milp(vit_b_menu(0), budget, gap=1e-6)
    mine = Knapsack().allocate(vit_b_menu(0), budget)
    assert theirs.gain <= mine.gain * (1 + 1e-9)
    assert mine.gain <= theirs.provenance.bound * (1 + 1e-9)  # type: ignore[operator]  # milp always gives a bound
