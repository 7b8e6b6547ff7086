"""Side constraints, caps, curves and the next best plan, against every set of options there is."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from autopeft.allocation import _exact, _groups, _milp, _problem, _rules
from autopeft.allocation._problem import curve_points
from autopeft.allocation.knapsack import Knapsack
from autopeft.core.allocation import Allocation
from autopeft.core.budget import Budget, Cost
from autopeft.core.cap import Cap, Term
from autopeft.core.menu import Menu, Option
from autopeft.core.site import Place, Site
from autopeft.errors import AutopeftError, InfeasibleBudget, UsageError
from autopeft.testing.oracles import random_menu

ROLES = ("attn.qkv", "mlp.fc1", "attn.proj", "mlp.fc1", "attn.qkv", "attn.proj")


def place(name: str, slot: str = "weight") -> Place:
    return Place(name, "bias" if slot == "bias" else "weight")


def small_menu(seed: int, sites: int = 5, positive: bool = False, caps: bool = False) -> Menu:
    """Two sites per block; matrices in sizes, biases, now and then something that takes both or a neighbour as well."""
    rng = np.random.default_rng(seed)
    listed = {
        f"b{i // 2}.s{i % 2}": Site(
            f"b{i // 2}.s{i % 2}", "m", "linear", (4, 4), True, i // 2, ROLES[i], ("weight", "bias")
        )
        for i in range(sites)
    }
    names = list(listed)
    options = []

    def add(site: str, method: str, size: int, *held: Place) -> None:
        gain = float(rng.integers(1 if positive else -1, 7)) if seed % 2 else rng.uniform(0.1 if positive else -1, 6)
        cost = int(rng.integers(1, 10))
        options.append(Option(site, method, size, Cost.plain(cost, cost), float(gain), tuple(sorted(held))))

    for i, name in enumerate(names):
        for size in range(1, int(rng.integers(2, 4))):
            add(name, "lora", size, place(name))
        if rng.random() < 0.5:
            add(name, "bias", 1, place(name, "bias"))
        if rng.random() < 0.25:
            add(name, "norm", 1, place(name), place(name, "bias"))
        if rng.random() < 0.25:
            add(name, "wide", 1, place(name), place(names[(i + 1) % sites], "bias"))
    return Menu(tuple(options), listed, caps=(random_cap(rng, options, sites),) if caps else ())


def random_cap(rng: np.random.Generator, options: list[Option], sites: int) -> Cap:
    """A chain of terms over the blocks, as the gradient's way is, and one term that some options share."""
    idents = [(o.site, o.method, o.size) for o in options]
    own = {ident: float(rng.uniform(0, 2)) for ident in idents if rng.random() < 0.7}
    depth = (sites + 1) // 2
    terms = (*(Term(float(rng.uniform(0, 3)), d - 1) for d in range(depth)), Term(float(rng.uniform(0, 3))))
    triggers = {
        ident: (int(ident[0][1]), *([depth] if ident[1] == "lora" and rng.random() < 0.5 else [])) for ident in idents
    }
    most = float(rng.uniform(3, 12))
    passing = {i: ((int(rng.integers(0, depth)), float(rng.uniform(0, 3))),) for i in idents if rng.random() < 0.5}
    return Cap("units", most, 1.0, own, terms, triggers, passing)


def every_plan(menu: Menu) -> Iterator[tuple[Option, ...]]:
    """All sets of options in which no two share a place."""

    def grow(i: int, chosen: tuple[Option, ...], taken: frozenset[Place]) -> Iterator[tuple[Option, ...]]:
        if i == len(menu.options):
            yield chosen
            return
        yield from grow(i + 1, chosen, taken)
        o = menu.options[i]
        if not taken & set(o.places):
            yield from grow(i + 1, (*chosen, o), taken | set(o.places))

    yield from grow(0, (), frozenset())


def at(o: Option, wanted: str, menu: Menu) -> bool:
    """Whether an option is at a site, written out once more."""
    names = {o.site, *(p.site for p in o.places)}
    if wanted.startswith("role:"):
        return any(fnmatchcase(menu.sites[n].role, wanted[5:]) for n in names)
    return any(fnmatchcase(n, wanted) for n in names)


def allowed(plan: tuple[Option, ...], menu: Menu, k: Knapsack) -> bool:
    """Every side constraint but `every_block` as a person reads it."""
    for text in k.forbid:
        if text.startswith("method:") and any(o.method == text[7:] for o in plan):
            return False
        if not text.startswith("method:") and any(at(o, text, menu) for o in plan):
            return False
    for text in k.require:
        if text.startswith("method:"):
            if not any(o.method == text[7:] for o in plan):
                return False
        elif "*" in text or text.startswith("role:"):
            names = [n for n in menu.sites if at_name(n, text, menu)]
            if not all(any(at(o, n, menu) for o in plan) for n in names if any(at(o, n, menu) for o in menu)):
                return False
        elif not any(at(o, text, menu) for o in plan):
            return False
    if k.max_options is not None and len(plan) > k.max_options:
        return False
    if k.max_methods is not None and len({o.method for o in plan}) > k.max_methods:
        return False
    if any(o.size > k.max_size.get(o.method, 99) for o in plan):
        return False
    for text in k.tie:
        for role in {s.role for s in menu.sites.values()} if text == "role" else {text.removeprefix("role:")}:
            tied = {n for n, s in menu.sites.items() if s.role == role}
            for method in {o.method for o in menu}:
                offering = {o.site for o in menu if o.method == method and o.site in tied}
                bought = [o for o in plan if o.method == method and o.site in tied]
                if bought and ({o.site for o in bought} != offering or len({o.size for o in bought}) > 1):
                    return False
    return all(cap.used(plan) <= cap.most for cap in menu.caps)


def at_name(name: str, text: str, menu: Menu) -> bool:
    return fnmatchcase(menu.sites[name].role, text[5:]) if text.startswith("role:") else fnmatchcase(name, text)


def fitting(menu: Menu, budget: Budget, k: Knapsack) -> list[tuple[Option, ...]]:
    """Every plan within budget and constraints; blocks in which none of them could ever buy anything must not."""
    plans = list(every_plan(menu))
    if k.every_block:
        offering = dataclasses.replace(k, every_block=False, require=(), max_options=None, max_methods=None)
        bare = Menu(menu.options, menu.sites)
        depths = {d for p in plans if allowed(p, bare, offering) for d in blocks(p, menu)}
        plans = [p for p in plans if blocks(p, menu) >= depths]
    return [p for p in plans if sum(o.cost.trainable for o in p) <= budget.limit and allowed(p, menu, k)]


def blocks(plan: tuple[Option, ...], menu: Menu) -> set[int]:
    return {menu.sites[n].depth for o in plan for n in {o.site, *(p.site for p in o.places)}}


SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"require": ("b0.s0",)},
    {"require": ("b1.*",)},
    {"require": ("role:attn.qkv",)},
    {"require": ("method:bias",)},
    {"require": ("method:bias", "b1.s0"), "max_options": 3},
    {"forbid": ("b0.s1", "method:norm")},
    {"forbid": ("role:mlp.*",)},
    {"forbid": ("b0.*",), "every_block": True},
    {"max_options": 2},
    {"max_methods": 1},
    {"max_methods": 2, "max_options": 4},
    {"max_size": {"lora": 1}, "require": ("b2.s0",)},
    {"every_block": True},
    {"every_block": True, "max_options": 3, "forbid": ("method:wide",)},
    {"tie": ("role",)},
    {"tie": ("role:attn.qkv",)},
    {"tie": ("role",), "max_methods": 1, "every_block": True},
)


def packed(menu: Menu, budget: Budget, k: Knapsack) -> Allocation | None:
    try:
        return k.allocate(menu, budget)
    except InfeasibleBudget:
        return None


def check_constraints(seeds: range) -> Counter[str]:
    """The best gain, its bound and its constraints, for every setting in turn; what occurred is counted."""
    seen: Counter[str] = Counter()
    for seed in seeds:
        menu, budget = small_menu(seed, caps=seed % 3 == 0), Budget((6, 11, 18, 30)[seed % 4])
        k = Knapsack(**SETTINGS[seed % len(SETTINGS)])
        plans = fitting(menu, budget, k)
        plan = packed(menu, budget, k)
        if not plans:
            assert plan is None, f"menu {seed}: bought {plan}, nothing is allowed"
            seen["infeasible"] += 1
            continue
        best = max(sum(o.gain for o in p) for p in plans)
        free = packed(Menu(menu.options, menu.sites), budget, Knapsack())
        assert plan is not None, f"menu {seed}: nothing found, {len(plans)} plans are allowed"
        assert allowed(plan.options, menu, k), f"menu {seed}: {k} is not kept"
        assert plan.gain == pytest.approx(best, rel=1e-9, abs=1e-9), f"menu {seed}: {plan.gain} is not {best}"
        assert plan.provenance.bound == pytest.approx(best, rel=1e-9, abs=1e-9)
        seen["solved"] += 1
        seen["binding"] += free is not None and best < free.gain - 1e-9
    return seen


def test_constraints_equal_every_plan() -> None:
    seen = check_constraints(range(126))
    assert min(seen["solved"] / 90, seen["infeasible"] / 3, seen["binding"] / 40) >= 1, seen


def few_columns(monkeypatch: pytest.MonkeyPatch, few: int = 3) -> None:
    """Small menus too are fixed by reduced costs, and HiGHS decides on methods."""
    monkeypatch.setattr(_milp, "_FEW", few)
    monkeypatch.setattr(_exact, "_SETS", 0)


@pytest.mark.parametrize("few", [1, 3])
def test_fixed_columns_change_nothing(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    few_columns(monkeypatch, few)
    seen = check_constraints(range(126))
    assert min(seen["solved"] / 90, seen["infeasible"] / 3, seen["binding"] / 40) >= 1, seen
    assert check_curves(range(27)) > 3


def test_fixing_too_much_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    few_columns(monkeypatch)
    monkeypatch.setattr(_milp, "_ROOM", -0.2)
    with pytest.raises((AssertionError, AutopeftError)):
        check_constraints(range(126))


def test_any_plan_is_judged_as_a_person_judges_it() -> None:
    """`every_block` excepted, which `allowed` leaves out."""
    seen: Counter[bool] = Counter()
    settings = [s for s in SETTINGS if "every_block" not in s]
    for seed in range(len(settings)):
        menu, k = small_menu(seed, caps=seed % 3 == 0), Knapsack(**settings[seed % len(settings)])
        for plan in every_plan(menu):
            kept = allowed(plan, menu, k)
            assert k.keeps(menu, Allocation(plan, Budget(10**6))) == kept, f"menu {seed}: {k}, {plan}"
            seen[kept] += 1
    assert min(seen.values()) > 1000, seen
    elsewhere = Option("b0.s0", "lora", 9, Cost.plain(1, 1), 1.0, (place("b0.s0"),))
    assert not Knapsack().keeps(small_menu(0), Allocation((elsewhere,), Budget(9)))
    assert Knapsack(gap=0.1, curve=0.5).plain
    assert not Knapsack(max_options=2).plain


@pytest.mark.slow
def test_constraints_equal_every_plan_on_a_thousand_menus() -> None:
    assert check_constraints(range(126, 1126))["solved"] > 700


def test_the_next_best_plan_equals_every_plan() -> None:
    """All gains positive, so that no plan with a useless option counts; ties of gain are common."""
    seen: Counter[str] = Counter()
    for seed in range(72):
        menu, budget = small_menu(seed, positive=True, caps=seed % 4 == 3), Budget((6, 11, 18, 60)[seed % 4])
        k = Knapsack(**SETTINGS[(seed // 2) % len(SETTINGS)] if seed % 2 else {})
        plans = fitting(menu, budget, k)
        plan = packed(menu, budget, k)
        if plan is None:
            continue
        others = [sum(o.gain for o in p) for p in plans if set(p) != set(plan.options)]
        rival = k.next_best(menu, budget, plan)
        if not others:
            assert rival is None, f"menu {seed}: found {rival}, there is no other"
            seen["alone"] += 1
            continue
        assert rival is not None, f"menu {seed}: found none of {len(others)}"
        assert set(rival.options) != set(plan.options)
        assert allowed(rival.options, menu, k)
        assert rival.gain == pytest.approx(max(others), rel=1e-9, abs=1e-9), f"menu {seed}"
        assert rival.provenance.bound == pytest.approx(max(others), rel=1e-9, abs=1e-9), f"menu {seed}"
        seen["tie" if rival.gain == pytest.approx(plan.gain) else "worse"] += 1
    assert min(seen["tie"] / 5, seen["worse"] / 30) >= 1, seen


@pytest.mark.parametrize("way", ["groups", "hubs", "milp"])
def test_the_next_best_plan_is_the_same_by_every_way(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Menus with ties, zero and negative gains; what does not gain is no part of another plan."""
    if way == "hubs":
        monkeypatch.setattr(_groups, "_MAX_SETS", 0)
    if way == "milp":
        monkeypatch.setattr(_exact, "_dynamic", lambda *args: None)
        monkeypatch.setattr(_groups, "_MAX_SETS", 0)
    for seed in range(30):
        menu, budget = random_menu(seed, integers=seed % 3 != 0), Budget((8, 14, 37)[seed % 3])
        plan = packed(menu, budget, Knapsack())
        if plan is None:
            continue
        useful = Menu(tuple(o for o in menu if o.gain > 0), menu.sites)
        others = [sum(o.gain for o in p) for p in fitting(useful, budget, Knapsack()) if set(p) != set(plan.options)]
        rival = Knapsack().next_best(menu, budget, plan)
        assert (rival is None) == (not others), seed
        if rival is not None:
            assert rival.options != plan.options
            assert rival.gain == pytest.approx(max(others), rel=1e-9, abs=1e-9), seed


def test_the_cheapest_plan_equals_every_plan() -> None:
    infeasible = 0
    for seed in range(36):
        menu, k = small_menu(seed, caps=seed % 3 == 0), Knapsack(**SETTINGS[seed % len(SETTINGS)])
        plans = [p for p in fitting(menu, Budget(10**6), k) if p]
        cheapest = k.cheapest(menu, Budget(1))
        if not plans:
            assert cheapest is None
            continue
        least = min(sum(o.cost.trainable for o in p) for p in plans)
        assert cheapest is not None
        assert cheapest.spent == least
        assert allowed(cheapest.options, menu, k)
        if k.require or k.every_block:
            with pytest.raises(InfeasibleBudget) as caught:
                k.allocate(menu, Budget(least - 1))
            single = min(o.cost.trainable for o in menu) == least
            assert single or caught.value.cheapest == least, seed
            infeasible += not single
            assert k.allocate(menu, Budget(least)).spent == least
    assert infeasible > 3


# ---------------------------------------------------------------- curves


def block_value(plans: list[tuple[Option, ...]], menu: Menu, exponent: float) -> list[float]:
    """Of each plan: sum over blocks of the curve at the block's gains, piece by piece, written out once more."""
    inside = {o: {menu.sites[n].depth for n in {o.site, *(p.site for p in o.places)}} for o in menu}
    values = [0.0] * len(plans)
    for depth in {s.depth for s in menu.sites.values()}:
        share = {o: o.gain / len(depths) for o, depths in inside.items() if depth in depths}
        top = sum(max(gain, 0.0) for gain in share.values())
        corners = [0.0, *(top / 2**k for k in range(15, -1, -1))] if top > 0 else [0.0, 1.0]
        pieces = list(pairwise(corners))
        slopes = [(b**exponent - a**exponent) / (b - a) for a, b in pieces]
        lines = [(slope, a**exponent - slope * a) for slope, (a, _) in zip(slopes, pieces, strict=True)]
        for i, plan in enumerate(plans):
            x = sum(share.get(o, 0.0) for o in plan)
            values[i] += min(slope * x + offset for slope, offset in lines)
    return values


def check_curves(seeds: range) -> int:
    other = 0
    for seed in seeds:
        menu, budget = small_menu(seed), Budget((6, 11, 18)[seed % 3])
        k = Knapsack(curve=(0.4, 0.5, 0.75)[seed % 3], **({"require": ("b1.s0",)} if seed % 5 == 0 else {}))
        plans = fitting(menu, budget, k)
        plan = packed(menu, budget, k)
        assert (plan is None) == (not plans)
        if plan is None:
            continue
        values = block_value(plans, menu, k.curve)
        assert block_value([plan.options], menu, k.curve)[0] == pytest.approx(max(values), rel=1e-8, abs=1e-8), seed
        assert plan.provenance.value == pytest.approx(max(values), rel=1e-8, abs=1e-8), seed
        assert plan.gap == pytest.approx(0.0, abs=1e-8)
        assert plan == k.allocate(Menu(menu.options[::-1], menu.sites), budget)
        other += plan.gain < max(sum(o.gain for o in p) for p in plans) - 1e-9
    return other


def test_curves_equal_every_plan() -> None:
    assert check_curves(range(27)) > 3


def test_a_curve_spreads_over_blocks() -> None:
    """One block gains 4 + 4 at 1 each, the other 3: the plain sum takes both of the first, the root one of each."""
    listed = {
        f"b{b}.s{i}": Site(f"b{b}.s{i}", "m", "linear", (4, 4), True, b, "mlp.fc1", ("weight",))
        for b in (0, 1)
        for i in (0, 1)
    }
    gains = {"b0.s0": 4.0, "b0.s1": 4.0, "b1.s0": 3.0}
    menu = Menu(tuple(Option(n, "m", 1, Cost.plain(1, 1), g, (place(n),)) for n, g in gains.items()), listed)
    assert [o.site for o in Knapsack().allocate(menu, Budget(2))] == ["b0.s0", "b0.s1"]
    spread = Knapsack(curve=0.5).allocate(menu, Budget(2))
    assert [o.site for o in spread][1] == "b1.s0"
    # 4 is a corner of the first block's curve (half of 8), 3 the top of the second's: both are exact.
    assert spread.provenance.value == pytest.approx(2.0 + math.sqrt(3.0))


def test_corners_of_a_curve() -> None:
    x, y = curve_points(8.0, 0.5)
    assert len(x) == 17
    assert x[0] == 0
    assert x[-1] == 8
    assert x[-2] == 4
    assert y == pytest.approx(np.sqrt(x))
    # Chords of a concave function never lie above it, and here nowhere more than 3 % below it past the first one.
    fine = np.linspace(x[1], 8, 4000)
    below = 1 - np.interp(fine, x, y) / np.sqrt(fine)
    assert below.min() > -1e-12
    assert below.max() < 0.031


# ---------------------------------------------------------------- planted bugs


def _forgets_forbidden_slices(option: Option) -> frozenset[str]:
    return frozenset({option.site})


def _terms_for_nothing(programme: Any, members: Any, column: int) -> None:
    """Switches no term and no method on."""


def _passes_for_nothing(programme: Any, amounts: Any, switch: int) -> Iterator[int]:
    """Forgets what options use while a term is on."""
    yield from ()


def _cuts_too_much(problem: Any, chosen: Any, proven: bool, limit: int, seconds: float) -> Any:
    """Leaves out the first option of the best plan alone."""
    gains = problem.gains.copy()
    gains[list(chosen)[:1]] = 0.0
    return _exact._dynamic(problem, gains, limit, 0.0, seconds)


def _ties_anything(bundles: Any, rules: Any, known: Any) -> Any:
    return tuple(_rules.Bundle(o, (o,)) for o in bundles)


def _keeps_all(self: Any, chosen: Any) -> bool:
    return True


def _chords_too_high(top: float, exponent: float) -> Any:
    x, y = curve_points(top, exponent)
    return x, np.concatenate((y[1:2] * 0, y[1:] * np.linspace(1.3, 1.0, len(y) - 1)))


BUGS: dict[str, tuple[object, str, object, Callable[[], object]]] = {
    "touched": (_rules, "touched", _forgets_forbidden_slices, lambda: check_constraints(range(126))),
    "terms": (_problem, "_switched", _terms_for_nothing, lambda: check_constraints(range(126))),
    "products": (_problem, "_products", _passes_for_nothing, lambda: check_constraints(range(126))),
    "ties": (_rules, "bundles_of", _ties_anything, lambda: check_constraints(range(126))),
    "shortcut": (_problem.Problem, "keeps", _keeps_all, lambda: check_constraints(range(126))),
    "rival": (_exact, "second", _cuts_too_much, test_the_next_best_plan_equals_every_plan),
    "curve": (_problem, "curve_points", _chords_too_high, lambda: check_curves(range(27))),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    where, name, broken, check = BUGS[bug]
    monkeypatch.setattr(where, name, broken)
    with pytest.raises((AssertionError, AutopeftError)):
        check()


# ---------------------------------------------------------------- single matters


def test_a_forbidden_projection_takes_its_slices_and_groups_along() -> None:
    def option(site: str, *names: str) -> Option:
        return Option(site, "m", 1, Cost.plain(1, 1), 1.0, tuple(sorted(place(n) for n in names)))

    whole = option("qkv", "qkv[k]", "qkv[q]", "qkv[v]")
    menu = Menu(
        (whole, option("qkv[q]", "qkv[q]"), option("fc", "fc"), option("*", "fc", "qkv[q]", "qkv[k]", "qkv[v]"))
    )
    assert [o.site for o in Knapsack(forbid=("qkv",)).allocate(menu, Budget(9))] == ["fc"]
    assert [o.site for o in Knapsack(forbid=("qkv[q]",)).allocate(menu, Budget(9))] == ["fc"]
    assert [o.site for o in Knapsack(forbid=("*",)).allocate(menu, Budget(9))] == [
        "fc",
        "qkv",
    ]  # the group of that name
    assert [o.site for o in Knapsack(require=("qkv",), max_options=1).allocate(menu, Budget(9))] != ["fc"]


def test_a_tie_of_sites_that_share_a_place() -> None:
    both = Menu(
        (
            Option("a", "m", 1, Cost.plain(1, 1), 1.0, (place("a[q]"),)),
            Option("a[q]", "m", 1, Cost.plain(1, 1), 1.0, (place("a[q]"),)),
        )
    )
    with pytest.raises(UsageError, match=r"tie 'a\*' of the knapsack holds a, a\[q\], which share a\[q\]:weight"):
        Knapsack(tie=("a*",)).allocate(both, Budget(5))


def test_what_the_menu_does_not_have() -> None:
    menu = small_menu(1)
    for name in ("require", "forbid", "tie"):
        with pytest.raises(UsageError, match=rf"{name} of the knapsack names 'blocks\.\*'"):
            Knapsack(**{name: ("blocks.*",)}).allocate(menu, Budget(9))
    with pytest.raises(InfeasibleBudget, match="an option of method:dora: nothing on the menu is"):
        Knapsack(require=("method:dora",)).allocate(menu, Budget(9))
    assert Knapsack(forbid=("method:dora",)).allocate(menu, Budget(9)) == Knapsack().allocate(menu, Budget(9))


def test_contradictions_are_named() -> None:
    with pytest.raises(InfeasibleBudget, match="contradict each other at any budget") as caught:
        Knapsack(require=("b0.*", "b1.*"), max_options=1).allocate(small_menu(2), Budget(99))
    assert caught.value.cheapest is None


def test_a_plan_from_elsewhere_has_no_rival() -> None:
    menu = small_menu(1)
    plan = Knapsack().allocate(menu, Budget(18))
    with pytest.raises(UsageError, match="was not bought from this menu"):
        Knapsack(forbid=(plan.options[0].site,)).next_best(menu, Budget(18), plan)


def test_the_plan_names_its_settings() -> None:
    plan = Knapsack(max_methods=2, tie=("role",)).allocate(small_menu(1), Budget(18))
    assert plan.provenance.allocator == "knapsack(max_methods=2, tie=('role',))"


@pytest.mark.parametrize("settings", [{"max_methods": 0}, {"curve": 0.3}, {"curve": 1.1}, {"curve": math.nan}])
def test_settings_out_of_range(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(settings))):
        Knapsack(**settings)


def test_milp_is_told_of_exact_limits() -> None:
    """A choice that oversteps a limit by less than HiGHS minds is forbidden, and the best other one taken."""
    programme = _milp.Programme(list(small_menu(1).options[:1]), np.ones(1))
    programme.row([0], [1.0], 1.0)
    asked: list[float] = []

    def used(chosen: Any) -> float:
        asked.append(float(len(chosen)))
        return float(len(chosen)) * (1 + 1e-8)

    programme.exact.append((used, 1.0))
    found = programme.solve(None)
    assert found is not None
    assert found.chosen == ()
    assert asked[0] == 1.0
