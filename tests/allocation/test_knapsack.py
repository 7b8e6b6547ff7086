from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice, product
from typing import Any

import numpy as np
import pytest

from autopeft.allocation import _exact, _forest, _groups, _mckp
from autopeft.allocation._milp import Programme
from autopeft.allocation.knapsack import Knapsack
from autopeft.core.allocation import Allocation
from autopeft.core.budget import Budget, Cost
from autopeft.core.contracts import Allocator
from autopeft.core.menu import Menu, Option
from autopeft.core.site import Place
from autopeft.errors import InfeasibleBudget, UsageError
from autopeft.testing.allocator_laws import BROKEN, AllocatorLaws, outcome
from autopeft.testing.oracles import best_by_enumeration, best_by_table, random_menu


def option(
    site: str, cost: int, gain: float, size: int = 1, method: str = "m", places: str = "", slot: str = "weight"
) -> Option:
    names = places.split("+") if places else [site]
    held = tuple(sorted(Place(n, "bias" if slot == "bias" else "weight") for n in names))
    return Option(site, method, size, Cost.plain(cost, cost), gain, held)


class TestLaws(AllocatorLaws):
    exact = True

    def make(self) -> Allocator:
        return Knapsack()


class TestLawsByMilp(AllocatorLaws):
    exact = True

    @pytest.fixture(autouse=True)
    def without_dynamic_programming(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_exact, "_dynamic", lambda *args: None)

    def make(self) -> Allocator:
        return Knapsack()

    def menus(self) -> Iterator[tuple[Menu, Budget]]:
        yield from islice(super().menus(), 1, 64, 5)


LAWS = ("test_within_budget", "test_deterministic", "test_blind_to_order", "test_exact")


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("broken", LAWS)
def test_a_broken_allocator_fails_its_law_and_no_other(broken: str, law: str) -> None:
    class Laws(AllocatorLaws):
        exact = broken == "test_exact"

        def make(self) -> Allocator:
            return BROKEN[broken]()

    if broken == law:
        with pytest.raises(AssertionError):
            getattr(Laws(), law)()
    else:
        getattr(Laws(), law)()


# ---------------------------------------------------------------- exactness


def check_300_menus(allocator: Allocator) -> None:
    """Brute force on 300 menus: ties, zero and negative gains, options above the budget, several places, budget 0."""
    seen = {"tie": 0, "negative": 0, "zero": 0, "above": 0, "several": 0, "budget 0": 0, "interlocked": 0}
    for seed in range(300):
        menu = random_menu(seed, integers=seed % 3 != 0)
        budget = Budget((0, 3, 8, 14, 20, 37)[seed % 6])
        gains = [o.gain for o in menu]
        seen["tie"] += len(set(gains)) < len(gains)
        seen["negative"] += min(gains) < 0
        seen["zero"] += 0.0 in gains
        seen["above"] += any(o.cost.trainable > budget.limit for o in menu)
        seen["several"] += any(len(o.places) > 1 for o in menu)
        seen["budget 0"] += budget.limit == 0
        seen["interlocked"] += len(menu) > 8 and any(len(o.places) == 3 for o in menu)
        plan = outcome(allocator, menu, budget)
        best = best_by_enumeration(menu, budget)
        assert plan.gain == pytest.approx(best, rel=1e-12, abs=1e-12), f"menu {seed}: {plan.gain} is not {best}"
    assert min(seen.values()) >= 25, seen


def test_equals_brute_force_on_300_menus() -> None:
    check_300_menus(Knapsack())


def test_milp_equals_brute_force_too() -> None:
    for seed in range(0, 60):
        menu, budget = random_menu(seed), Budget(14)
        plan = outcome(Knapsack(), menu, budget)
        assert plan.gain == pytest.approx(best_by_enumeration(menu, budget), rel=1e-9, abs=1e-9)


def larger_menu(seed: int, sites: int, sizes: int, correlated: bool) -> Menu:
    """Single-place options; strongly correlated gains (cost plus a constant) are what solvers find hard."""
    rng = np.random.default_rng(seed)
    options = []
    for i in range(sites):
        costs = np.unique(rng.integers(1, 400, sizes))
        gains = costs + 20.0 if correlated else np.sort(rng.uniform(0, 10, len(costs)))
        options += [option(f"s{i}", int(c), float(g), k + 1) for k, (c, g) in enumerate(zip(costs, gains, strict=True))]
    return Menu(tuple(options))


@pytest.mark.parametrize("correlated", [False, True])
def test_equals_the_plain_table_on_larger_menus(correlated: bool) -> None:
    for seed, limit in product(range(4), (97, 1500, 4001)):
        menu = larger_menu(seed, 40, 8, correlated)
        plan = Knapsack().allocate(menu, Budget(limit))
        assert plan.gain == pytest.approx(best_by_table(menu, Budget(limit)), rel=1e-12)
        assert plan.provenance.bound == plan.gain


def test_equals_milp_on_interlocked_menus(by_milp: Callable[..., Allocation]) -> None:
    for seed in range(5):
        menu = random_menu(seed, sites=30, sizes=4, integers=False, largest_cost=40)
        assert len(menu) > 60
        mine = Knapsack().allocate(menu, Budget(300))
        theirs = by_milp(menu, Budget(300))
        assert mine.gain == pytest.approx(theirs.gain, rel=1e-9)


def test_an_interlocked_projection_equals_milp(by_milp: Callable[..., Allocation]) -> None:
    """qkv whole or by slices, with weights, biases and something that takes both: one component per block."""
    rng = np.random.default_rng(0)
    options = []
    for block in range(4):
        slices = [f"b{block}[{s}]" for s in "qkv"]
        for method, names in [("whole", slices), *((f"slice-{n}", [n]) for n in slices)]:
            site = f"b{block}" if method == "whole" else names[0]
            for slots in (("weight",), ("bias",), ("weight", "bias")):
                places = tuple(sorted(Place(n, s) for n in names for s in slots))  # type: ignore[arg-type]
                for size in range(1, 6):
                    cost = len(places) * size**2
                    gain = math.sqrt(size * rng.uniform(0.2, 1.0) * len(places))
                    options.append(Option(site, "+".join(slots), size, Cost.plain(cost, cost), gain, places))
    menu = Menu(tuple(options))
    for limit in (3, 40, 150):
        mine = Knapsack().allocate(menu, Budget(limit))
        theirs = by_milp(menu, Budget(limit))
        assert mine.gain == pytest.approx(theirs.gain, rel=1e-9)


# ---------------------------------------------------------------- planted bugs


def _keeps_the_cheapest(costs: np.ndarray, gains: np.ndarray, floor: float = 0.0) -> np.ndarray:
    """Bug 1: of items of equal cost keeps the one listed first, whatever it gains."""
    order = np.argsort(costs, kind="stable")
    _, first = np.unique(costs[order], return_index=True)
    kept = order[first]
    ranked = gains[kept]
    before = np.maximum.accumulate(np.concatenate(([floor], ranked[:-1])))
    return kept[ranked > before]


def _rounds_the_relaxation(groups: list[_groups.Group], limit: int, gap: float, seconds: float) -> _mckp.Packing:
    """Bug 2: takes the relaxation without its fractional step for the optimum."""
    relaxed = _mckp.relax(groups, limit)
    return _mckp.Packing(relaxed.base, relaxed.bound, relaxed.price, True)


def _never_pays_back(cost, gain, room, base, up, down):  # type: ignore[no-untyped-def]
    """Bug 3: drops states that overshoot for now, though a later group could make room."""
    return np.where(room - cost < 0, -np.inf, base + gain + up * (room - cost))


def _ignores_shared_places(component: list[tuple[Place, ...]]) -> bool:
    """Bug 4: takes every component for one group of options that exclude each other."""
    return True


BUGS: dict[str, tuple[object, str, Callable[..., object]]] = {
    "dominance": (_groups, "pareto", _keeps_the_cheapest),
    "rounding": (_mckp, "solve", _rounds_the_relaxation),
    "pruning": (_mckp, "_bounds", _never_pays_back),
    "components": (_groups, "_exclusive", _ignores_shared_places),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, name, broken = BUGS[bug]
    monkeypatch.setattr(module, name, broken)
    with pytest.raises(AssertionError):
        check_300_menus(Knapsack())


# ---------------------------------------------------------------- bound, price, ties


def test_hand_worked_bound_and_price() -> None:
    # Hull steps: a 6/2 = 3, b 4/2 = 2, a 2/2 = 1. Budget 5 takes a (2), b (4); one unit is left at slope 1: bound 11.
    menu = Menu((option("a", 2, 6.0), option("a", 4, 8.0, 2), option("b", 2, 4.0)))
    plan = Knapsack().allocate(menu, Budget(5))
    assert (plan.gain, plan.spent) == (10.0, 4)
    assert plan.provenance.price == 1.0
    assert plan.provenance.bound == 10.0  # proven, though the relaxation's own bound is 11
    stopped = Knapsack(gap=0.5).allocate(menu, Budget(5))
    assert stopped.provenance.bound is not None
    assert stopped.gain <= 10.0 <= stopped.provenance.bound <= 11.0


def test_price_is_zero_when_everything_fits() -> None:
    plan = Knapsack().allocate(Menu((option("a", 2, 6.0), option("b", 2, 4.0))), Budget(100))
    assert plan.provenance.price == 0.0
    assert len(plan) == 2


def test_of_equal_plans_the_cheaper_then_the_first_is_taken() -> None:
    equal = Menu((option("b", 2, 5.0), option("a", 2, 5.0)))
    assert [o.site for o in Knapsack().allocate(equal, Budget(3))] == ["a"]
    assert [o.site for o in Knapsack().allocate(Menu(equal.options[::-1]), Budget(3))] == ["a"]
    cheaper = Menu((option("a", 3, 5.0, 2), option("a", 2, 5.0, 1)))
    assert [o.size for o in Knapsack().allocate(cheaper, Budget(9))] == [1]


def test_a_whole_projection_competes_with_its_slices() -> None:
    slices = [option(f"qkv[{s}]", 3, g) for s, g in (("q", 1.0), ("k", 2.0), ("v", 4.0))]
    whole = option("qkv", 5, 6.5, places="qkv[q]+qkv[k]+qkv[v]")
    menu = Menu((*slices, whole))
    assert Knapsack().allocate(menu, Budget(5)).gain == 6.5
    assert Knapsack().allocate(menu, Budget(9)).gain == 7.0
    assert Knapsack().allocate(menu, Budget(6)).options == (whole,)


def test_costs_are_counted_in_the_budgets_unit() -> None:
    free = Option("a", "adapter", 1, Cost(10, 10, 320, 0), 2.0, (Place("a", "output"),))
    dearer = Option("a", "adapter", 2, Cost(10, 10, 320, 4), 3.0, (Place("a", "output"),))
    plan = Knapsack().allocate(Menu((free, dearer)), Budget(3, "entries"))
    assert (plan.options, plan.spent) == ((free,), 0)
    assert Knapsack().allocate(Menu((free, dearer)), Budget(4, "entries")).options == (dearer,)


def test_a_component_too_large_to_enumerate_goes_to_milp(monkeypatch: pytest.MonkeyPatch) -> None:
    menu = random_menu(3, sites=8, sizes=3, integers=False)
    expected = Knapsack().allocate(menu, Budget(40))
    monkeypatch.setattr(_groups, "_MAX_SETS", 3)
    monkeypatch.setattr(_forest, "_MAX_NODES", 3)
    called = []
    pack = Programme.solve
    monkeypatch.setattr(Programme, "solve", lambda *a, **k: called.append(1) or pack(*a, **k))
    found = Knapsack().allocate(menu, Budget(40))
    assert called
    assert found.gain == pytest.approx(expected.gain, rel=1e-9)


def test_a_time_limit_leaves_a_feasible_plan_and_a_valid_bound() -> None:
    menu = larger_menu(1, 60, 12, correlated=True)
    exact = Knapsack().allocate(menu, Budget(3001))
    hasty = Knapsack(time_limit=1e-9).allocate(menu, Budget(3001))
    assert 0 < hasty.gain <= exact.gain + 1e-9
    assert hasty.provenance.bound is not None
    assert hasty.provenance.bound >= exact.gain


# ---------------------------------------------------------------- side constraints


def constrained_menu() -> Menu:
    ranks = [
        option(f"s{i}", c, g, k, "lora")
        for i in range(4)
        for k, c, g in ((1, 2, 1.0 + i), (2, 4, 1.8 + 2 * i), (4, 8, 2.5 + 3 * i))
    ]
    return Menu((*ranks, option("poor", 3, -2.0)))


def test_side_constraints_equal_enumeration() -> None:
    menu, budget = constrained_menu(), Budget(17)
    settings = [
        (Knapsack(require=("s0", "poor")), lambda p: {"s0", "poor"} <= {o.site for o in p}),
        (Knapsack(forbid=("s3",)), lambda p: "s3" not in {o.site for o in p}),
        (Knapsack(max_options=2), lambda p: len(p) <= 2),
        (Knapsack(max_size={"lora": 2}), lambda p: all(o.size <= 2 for o in p)),
        (
            Knapsack(require=("s0",), max_options=2, max_size={"lora": 2}),
            lambda p: "s0" in {o.site for o in p} and len(p) <= 2 and all(o.size <= 2 for o in p),
        ),
    ]
    per_site = [[None, *(o for o in menu if o.site == s)] for s in ("s0", "s1", "s2", "s3", "poor")]
    plans = [[o for o in choice if o] for choice in product(*per_site)]
    plans = [p for p in plans if sum(o.cost.trainable for o in p) <= budget.limit]
    for knapsack, allowed in settings:
        best = max(sum(o.gain for o in p) for p in plans if allowed(p))
        plan = knapsack.allocate(menu, budget)
        assert allowed(plan.options)
        assert plan.gain == pytest.approx(best, abs=1e-9)
        assert plan.provenance.bound == pytest.approx(best, abs=1e-9)


def test_milp_price_is_the_relaxations(by_milp: Callable[..., Allocation]) -> None:
    menu = Menu((option("a", 2, 6.0), option("a", 4, 8.0, 2), option("b", 2, 4.0)))
    assert by_milp(menu, Budget(5)).provenance.price == pytest.approx(1.0)


def test_requirements_that_do_not_fit() -> None:
    with pytest.raises(InfeasibleBudget, match="an option at s0; an option at s1: the cheapest one costs 4") as caught:
        Knapsack(require=("s0", "s1")).allocate(constrained_menu(), Budget(3))
    assert caught.value.cheapest == 4
    with pytest.raises(UsageError, match="'nowhere'"):
        Knapsack(require=("nowhere",)).allocate(constrained_menu(), Budget(30))


def test_nothing_fits() -> None:
    menu = Menu((option("a", 12, 6.0), option("b", 20, 8.0)))
    with pytest.raises(InfeasibleBudget, match="cheapest option, m of size 1 at a, costs 12") as caught:
        Knapsack().allocate(menu, Budget(11))
    assert caught.value.cheapest == 12
    assert Knapsack().allocate(Menu(()), Budget(0)).options == ()
    assert Knapsack().allocate(Menu((option("a", 1, -1.0),)), Budget(5)).options == ()


@pytest.mark.parametrize(
    "settings",
    [
        {"gap": 1.0},
        {"gap": -0.1},
        {"gap": math.nan},
        {"time_limit": 0.0},
        {"max_options": 0},
        {"max_size": {"lora": 0}},
        {"require": ("a",), "forbid": ("a",)},
    ],
)
def test_settings_out_of_range(settings: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=next(iter(settings))):
        Knapsack(**settings)  # type: ignore[arg-type]


def test_the_plan_names_its_settings() -> None:
    plan = Knapsack(max_options=3).allocate(constrained_menu(), Budget(17))
    assert plan.provenance.allocator == "knapsack(max_options=3)"
    assert Knapsack().allocate(constrained_menu(), Budget(17)).provenance.allocator == "knapsack"


def test_nothing_native_reaches_standard_output() -> None:
    code = (
        "import os, ctypes\n"
        "from autopeft.allocation import _exact\n"
        "from autopeft.allocation._milp import quiet_stdout\n"
        "from autopeft.allocation.knapsack import Knapsack\n"
        "from autopeft.core.budget import Budget\n"
        "from autopeft.testing.oracles import random_menu\n"
        "print('before')\n"
        "_exact._dynamic = lambda *args: None\n"
        "Knapsack().allocate(random_menu(1), Budget(20))\n"
        "with quiet_stdout():\n"
        "    os.write(1, b'noise')\n"
        "    ctypes.CDLL(None).puts(b'buffered noise')\n"
        "print('after')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout == "before\nafter\n"


# ---------------------------------------------------------------- the mixed menu of a ViT-B


def vit_b_menu(seed: int) -> Menu:
    """169 places: weight and bias of 48 matrices and 25 norms, and 23 vectors more.

    LoRA, core and entries on every matrix, vectors and entries on biases and norms; concave gains whose scale varies
    a hundredfold between places.
    """
    rng = np.random.default_rng(seed)
    options: list[Option] = []

    def add(site: str, method: str, size: int, cost: int, gain: float, *slots: str) -> None:
        places = tuple(sorted(Place(site, s) for s in slots))  # type: ignore[arg-type]
        options.append(Option(site, method, size, Cost.plain(cost, cost), math.sqrt(gain), places))

    shapes = {"attn.qkv": (2304, 768), "attn.proj": (768, 768), "mlp.fc1": (3072, 768), "mlp.fc2": (768, 3072)}
    for block, (name, (out, in_)) in product(range(12), shapes.items()):
        site = f"blocks.{block}.{name}"
        energy = math.exp(rng.normal(0, 1.2))
        bend = rng.uniform(0.3, 1.2, 3)
        for r in (1, 2, 4, 8, 16):
            add(site, "lora", r, r * (out + in_), energy * (1 - math.exp(-r * bend[0] / 4)), "weight")
        for a in (1, 2, 3, 4, 6, 8, 10, 12, 14, 16, 20, 24, 32, 48, 64):
            add(site, "core", a, a * a, 0.7 * energy * (1 - math.exp(-a * bend[1] / 10)), "weight")
        for n in (16, 64, 256, 1024, 4096):
            add(site, "sparse", n, n, 0.3 * energy * (n / 4096) ** (bend[2] / 2), "weight")
        vector = energy * rng.uniform(0.01, 0.2)
        add(site, "bias", 1, out, vector, "bias")
        for n in (8, 32, 128):
            add(site, "sparse_bias", n, n, vector * (n / out) ** 0.4, "bias")
    for name in [*(f"blocks.{b}.norm{i}" for b in range(12) for i in (1, 2)), "norm"]:
        weight, bias = rng.uniform(0.01, 0.2, 2)
        add(name, "norm", 1, 1536, weight + bias, "weight", "bias")
        add(name, "vector", 1, 768, weight, "weight")
        add(name, "bias", 1, 768, bias, "bias")
        for n in (8, 32, 128):
            add(name, "sparse", n, n, weight * (n / 768) ** 0.5, "weight")
            add(name, "sparse_bias", n, n, bias * (n / 768) ** 0.5, "bias")
    for i in range(23):
        add(f"extra{i}", "vector", 1, 768, rng.uniform(0.001, 0.1), "weight")
    return Menu(tuple(options))


def cpu_seconds(allocate: Callable[[], object], runs: int = 5) -> float:
    """The quickest of a few runs, in processor time: other processes do not count."""
    best = math.inf
    for _ in range(runs):
        start = time.process_time()
        allocate()
        best = min(best, time.process_time() - start)
    return best


def test_the_mixed_vit_b_menu_is_solved_to_optimality() -> None:
    budget = Budget(85_798)
    for seed in range(3):
        menu = vit_b_menu(seed)
        assert len({p for o in menu for p in o.places}) == 169
        assert 1600 <= len(menu) <= 1700
        assert math.gcd(*(o.cost.trainable for o in menu)) == 1
        near = Knapsack(gap=1e-4).allocate(menu, budget)
        exact = Knapsack().allocate(menu, budget)
        assert exact.provenance.bound == exact.gain
        assert near.provenance.bound is not None
        assert near.provenance.bound - near.gain <= 1e-4 * near.provenance.bound
        assert near.gain <= exact.gain <= near.provenance.bound
        # Required: 50 ms and 1 s; measured here: 10 to 15 ms for both.
        assert cpu_seconds(lambda menu=menu: Knapsack(gap=1e-4).allocate(menu, budget)) < 0.05
        assert cpu_seconds(lambda menu=menu: Knapsack().allocate(menu, budget)) < 1.0


@pytest.mark.parametrize(
    "settings",
    [
        {"max_options": 20},
        {"max_methods": 2},
        {"max_methods": 3},
        {"max_options": 60, "require": ("blocks.0.attn.qkv", "blocks.11.mlp.fc2")},
    ],
    ids=lambda s: "-".join(s),
)
def test_side_constraints_on_the_mixed_vit_b_menu(settings: dict[str, Any]) -> None:
    """None of them is kept by the plan that is best without, and each is proven within a second."""
    menu, budget, k = vit_b_menu(0), Budget(85_798), Knapsack(**settings)
    plan = k.allocate(menu, budget)
    assert plan.options != Knapsack().allocate(menu, budget).options
    assert plan.gap <= 1e-12
    assert k.keeps(menu, plan)
    assert cpu_seconds(lambda: k.allocate(menu, budget), 2) < 1.0


def test_the_mixed_vit_b_menu_agrees_with_milp(by_milp: Callable[..., Allocation]) -> None:
    menu, budget = vit_b_menu(0), Budget(85_798)
    exact = Knapsack().allocate(menu, budget)
    theirs = by_milp(menu, budget)
    assert exact.gain == pytest.approx(theirs.gain, rel=1e-9)
    assert theirs.provenance.price == pytest.approx(exact.provenance.price, rel=1e-6)
