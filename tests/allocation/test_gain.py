from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pytest

from autopeft.allocation._roles import role_group
from autopeft.allocation.gain import CALIBRATION, GainPolicy, build_menu, energies
from autopeft.core.budget import Budget, Cost
from autopeft.core.contracts import Method
from autopeft.core.scores import Evidence, ScoreOrigin, Scores
from autopeft.core.site import Catalog, Place, Site
from autopeft.errors import UsageError


@dataclass(frozen=True)
class Table:
    """A method that costs 10 per size and gains what the table says."""

    gain: Mapping[str, tuple[float, ...]]
    family: str = "matrix"

    def slots(self, site: Site) -> tuple[str, ...]:
        return ("weight",) if site.name in self.gain else ()

    def sizes(self, site: Site) -> tuple[int, ...]:
        return tuple(range(1, 1 + len(self.gain[site.name])))

    def cost(self, site: Site, size: int) -> Cost:
        return Cost.plain(10 * size, 10 * size)

    def gains(self, site: Site, evidence: Evidence, sizes: Sequence[int]) -> tuple[float, ...]:
        return tuple(self.gain[site.name][size - 1] for size in sizes)


def site(name: str, depth: int, role: str, kind: str = "linear") -> Site:
    shape = (4,) if kind == "layer_norm" else (4, 4)
    return Site(name, name, kind, shape, True, depth, role, ("weight", "bias"))  # type: ignore[arg-type]


SITES = (site("a", 0, "attn.qkv"), site("b", 1, "mlp.fc1"), site("c", 2, "norm", "layer_norm"))
CATALOG = Catalog(SITES, ("head",), 100, 10, 3)
SCORES = Scores(ScoreOrigin("hand-made", 1, ""), {}, {s.name: Evidence(s, {}) for s in SITES})
METHODS: Mapping[str, Method] = {
    "x": Table({"a": (4.0, 9.0), "b": (1.0,), "c": (-1.0,)}),  # type: ignore[dict-item]
    "y": Table({"a": (6.0,)}),  # type: ignore[dict-item]
}
BUDGET = Budget(20)


def gains(policy: GainPolicy, budget: Budget = BUDGET) -> dict[tuple[str, str, int], float]:
    menu = build_menu(CATALOG, METHODS, SCORES, policy, budget=budget)
    return {(o.site, o.method, o.size): o.gain for o in menu}


def test_hand_worked_gains() -> None:
    # Largest energies per site: 9, 1 and 0 (what is negative counts as none): total 10.
    plain = gains(GainPolicy(exponent=1.0, calibration={}))
    expected = {("a", "x", 1): 0.4, ("a", "x", 2): 0.9, ("a", "y", 1): 0.6, ("b", "x", 1): 0.1, ("c", "x", 1): -0.1}
    assert plain == pytest.approx(expected)
    root = gains(GainPolicy(exponent=0.5, calibration={}))
    assert root[("a", "x", 2)] == pytest.approx(math.sqrt(0.9))
    assert root[("c", "x", 1)] == pytest.approx(-math.sqrt(0.1))


def test_corrections_are_the_formula() -> None:
    policy = GainPolicy(
        0.7, {"x": 3.0}, {"qkv": 0.5, "norm": 2.0}, depth_tilt=0.4, depth_curvature=-0.3, calibration={}
    )
    found = gains(policy)
    # Depths 0, 1, 2 of 3 are z = -1, 0, 1; the curvature term is 2/3 at the ends and -1/3 in the middle.
    assert found[("a", "x", 2)] == pytest.approx(3 * 0.5 * math.exp(-0.4 - 0.2) * 0.9**0.7)
    assert found[("a", "y", 1)] == pytest.approx(0.5 * math.exp(-0.4 - 0.2) * 0.6**0.7)
    assert found[("b", "x", 1)] == pytest.approx(3 * math.exp(0.1) * 0.1**0.7)
    assert found[("c", "x", 1)] == pytest.approx(-3 * 2 * math.exp(0.4 - 0.2) * 0.1**0.7)
    assert policy.correct(0.9, "x", "qkv", -1.0) == pytest.approx(found[("a", "x", 2)])
    assert policy.correct(-0.1, "x", "norm", 1.0) == pytest.approx(found[("c", "x", 1)])


def test_families_are_worth_what_was_measured() -> None:
    policy = GainPolicy(1.0, calibration={"matrix": 0.25})
    assert gains(policy)[("a", "x", 2)] == pytest.approx(0.25 * 0.9)
    assert policy.correct(0.9, "x", "qkv", 0.0, "matrix") == pytest.approx(0.25 * 0.9)
    assert GainPolicy().calibration == CALIBRATION


def test_the_curvature_term_has_mean_zero_over_depth() -> None:
    n = 2001
    z = [2 * i / (n - 1) - 1 for i in range(n)]
    assert sum(math.log(GainPolicy(depth_curvature=1.0).correct(1.0, "x", "qkv", v)) for v in z) / n == pytest.approx(
        0.0, abs=1e-3
    )


def test_a_multiplier_of_zero_takes_a_method_off_the_menu() -> None:
    assert {method for _, method, _ in gains(GainPolicy(methods={"x": 0.0, "unknown": 3.0}))} == {"y"}


def test_sizes_above_the_budget_are_not_offered() -> None:
    assert set(gains(GainPolicy(), Budget(19))) == {("a", "x", 1), ("a", "y", 1), ("b", "x", 1), ("c", "x", 1)}
    assert gains(GainPolicy(), Budget(9)) == {}


def test_a_model_of_one_block_has_no_depth() -> None:
    alone = Catalog((SITES[0],), ("head",), 100, 10, 1)
    menu = build_menu(alone, METHODS, SCORES, GainPolicy(1.0, depth_tilt=5.0, calibration={}), budget=BUDGET)
    assert max(o.gain for o in menu) == pytest.approx(1.0)


def test_sites_without_evidence_are_not_offered(
    vit: Catalog, methods: Mapping[str, Method], scores_of: Callable[..., Scores]
) -> None:
    scores = scores_of(vit.sites)
    known = {n: e for n, e in scores.evidence.items() if n != "blocks.0.mlp.fc1"}
    # No evidence on one bias: methods on the weight of that site stay.
    item = known["blocks.1.mlp.fc1"]
    known["blocks.1.mlp.fc1"] = Evidence(item.site, {"weight": item["weight"]})
    menu = build_menu(
        vit, methods, Scores(scores.origin, scores.totals, known), GainPolicy(), fused="whole", budget=Budget(10**6)
    )
    assert "blocks.0.mlp.fc1" not in {o.site for o in menu}
    offered = {o.method for o in menu if o.site == "blocks.1.mlp.fc1"}
    assert "lora" in offered
    assert not offered & {"bias", "sparse_bias"}


def test_menus_of_real_methods(vit: Catalog, methods: Mapping[str, Method], scores_of: Callable[..., Scores]) -> None:
    scores, budget = scores_of(vit.sites), Budget(200)
    known = energies(vit, methods, scores, fused="both", budget=budget)
    menu = build_menu(vit, methods, scores, GainPolicy(), fused="both", budget=budget, energies=known)
    again = build_menu(vit, methods, scores, GainPolicy(), fused="both", budget=budget)
    assert menu.options == again.options
    assert menu.scores is scores
    assert set(menu.sites) == {s.name for s in vit.offered("both")}
    for o in menu:
        assert o.cost == methods[o.method].cost(vit[o.site], o.size)
        assert o.cost.trainable <= 200
        assert o.places == tuple(sorted(vit.places(vit[o.site], methods[o.method].slots(vit[o.site]))))
    qkv = next(o for o in menu if o.site == "blocks.0.attn.qkv" and o.method == "lora")
    assert qkv.places == tuple(Place(f"blocks.0.attn.qkv[{p}]", "weight") for p in "kqv")
    # Energy of a method grows with its size, and so does the gain.
    for key in ("lora", "sparse"):
        row = [o.gain for o in menu if (o.site, o.method) == ("blocks.0.mlp.fc1", key)]
        assert len(row) >= 2
        assert row == sorted(row)


def test_gains_do_not_depend_on_the_scale_of_the_scores(
    vit: Catalog, methods: Mapping[str, Method], scores_of: Callable[..., Scores]
) -> None:
    a, b = (
        build_menu(vit, methods, scores_of(vit.sites, scale=s), GainPolicy(0.3), budget=Budget(100))
        for s in (1.0, 32.0)
    )
    assert [o.gain for o in a] == pytest.approx([o.gain for o in b], rel=1e-5)


def test_a_gain_that_is_not_finite_is_refused() -> None:
    broken: Mapping[str, Method] = {"x": Table({"a": (math.nan,)})}  # type: ignore[dict-item]
    with pytest.raises(UsageError, match="'x' of size 1 predicts a gain of nan at a"):
        build_menu(CATALOG, broken, SCORES, GainPolicy(), budget=BUDGET)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"exponent": 0.0}, "exponent"),
        ({"exponent": 1.1}, "exponent"),
        ({"exponent": math.nan}, "exponent"),
        ({"methods": {"lora": -1.0}}, "methods.lora"),
        ({"roles": {"mlp": math.inf}}, "roles.mlp"),
        ({"roles": {"mpl": 1.0}}, "'mpl'"),
        ({"depth_tilt": math.nan}, "depth_tilt"),
        ({"depth_curvature": 50.0}, "depth_curvature"),
    ],
)
def test_settings_out_of_range(settings: dict[str, object], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        GainPolicy(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("role", "kind", "group"),
    [
        ("attn.qkv", "linear", "qkv"),
        ("attn.k", "linear", "qkv"),
        ("attn.proj", "linear", "proj"),
        ("mlp.fc2", "linear", "mlp"),
        ("mlp.fc1", "conv2d", "mlp"),
        ("norm", "layer_norm", "norm"),
        ("norm", "batch_norm", "norm"),
        ("conv", "conv2d", "conv"),
        ("stem", "conv2d", "conv"),
        ("downsample", "linear", "other"),
        ("tokens", "tokens", "other"),
        ("block", "block", "other"),
    ],
)
def test_role_groups(role: str, kind: str, group: str) -> None:
    assert role_group(Site("s", "s", kind, (4, 4), True, 0, role, ())) == group  # type: ignore[arg-type]
