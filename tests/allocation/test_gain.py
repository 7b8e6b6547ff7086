from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from autopeft.allocation._roles import role_group
from autopeft.allocation.energies import energies
from autopeft.allocation.gain import CALIBRATION, GainPolicy, build_menu
from autopeft.allocation.knapsack import Knapsack
from autopeft.core.budget import Budget, Cost
from autopeft.core.contracts import Method, Scorer
from autopeft.core.scores import Evidence, ScoreOrigin, Scores, TensorEvidence
from autopeft.core.site import Catalog, Place, Site
from autopeft.errors import UsageError
from autopeft.methods.core import Core
from autopeft.methods.sparse import Sparse
from autopeft.scoring.calibrated import Calibrated
from autopeft.scoring.gradient import Gradient


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


def test_entries_are_chosen_on_one_half_and_valued_on_the_other() -> None:
    """Halves (3, 1, 0) and (1, 2, 2), signal of energy 9: the first half chooses 3, then 1; the second says 1, then 5.

    The second half has energy 9 as well, so nothing is scaled. In sample, the best entry would be worth 4.
    """
    place = Site("a", "a", "linear", (1, 3), False, 0, "mlp.fc1", ("weight",))
    signal = torch.tensor([[2.0, 2.0, 1.0]])
    halves = torch.tensor([[3.0, 1.0, 0.0]]), torch.tensor([[1.0, 2.0, 2.0]])
    known = TensorEvidence(signal, signal, signal.square(), *halves)
    scores = Scores(SCORES.origin, {}, {"a": Evidence(place, {"weight": known})})
    catalog = Catalog((place,), ("head",), 3, 1, 1)
    chosen = {"sparse": Sparse(), "core": Core()}
    found = energies(catalog, chosen, scores, budget=BUDGET)
    values = {(o.method, o.size): o.gain for o in found.options}
    assert values["sparse", 1] == pytest.approx(1)
    assert values["sparse", 2] == pytest.approx(5)
    # Other families read the signal: W has one singular pair.
    assert values["core", 1] == pytest.approx(9)
    weaker = dataclasses.replace(known, half_c=halves[1] / 3)
    scores = Scores(SCORES.origin, {}, {"a": Evidence(place, {"weight": weaker})})
    again = energies(catalog, chosen, scores, budget=BUDGET)
    assert {(o.method, o.size): o.gain for o in again.options}["sparse", 1] == pytest.approx(1)


def test_the_hull_alone() -> None:
    whole = gains(GainPolicy(exponent=1.0, calibration={}))
    hull = gains(GainPolicy(exponent=1.0, calibration={}, hull=True))
    # Of 0.4 for 10 and 0.9 for 20 the first lies below the line; what loses goes as well.
    assert set(whole) - set(hull) == {("a", "x", 1), ("c", "x", 1)}


def test_methods_may_be_valued_by_their_tangent(
    vit: Catalog, methods: Mapping[str, Method], scores_of: Callable[..., Scores]
) -> None:
    """Core's own formula is its tangent's; LoRA's is the best of its rank, which its random start does not reach."""
    scores, budget = scores_of(vit.sites), Budget(150)
    chosen: dict[str, Method] = {"core": Core(), "lora": methods["lora"]}
    plain = energies(vit, chosen, scores, budget=budget)
    tangent = energies(vit, chosen, scores, budget=budget, tangent=("core", "lora"))
    for one, two in zip(plain.options, tangent.options, strict=True):
        assert (one.site, one.method, one.size) == (two.site, two.method, two.size)
        if one.method == "core":
            assert two.gain == pytest.approx(one.gain, rel=1e-4)
    assert any(two.gain != one.gain for one, two in zip(plain.options, tangent.options, strict=True))
    menu = build_menu(vit, chosen, scores, GainPolicy(tangent=("lora",)), budget=budget)
    assert len(menu) == len(plain.options)


class Quadratic:
    """Losses of two biases b, 4 entries each: `g^T b + F |b|^2 / 2` with g = 10 + noise, F = 200 and g = 4, F = 16.

    The noise is +-10, so that the mean square of a sample's gradient is F in both.
    """

    classes, data_hash, sizes = ("a",), "quadratic", {"inner": 64, "outer": 0, "test": 0}

    def batches(self, split: str, seed: int | None = None, batch_size: int | None = None) -> Iterator[Tensor]:
        signs = torch.ones(64, dtype=torch.float64)
        signs[torch.randperm(64, generator=torch.Generator().manual_seed(1))[:32]] = -1
        yield from signs.split(batch_size or 64)

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        steep, flat = (part.bias for part in model.children())
        slope = (10 + 10 * batch.mean()) * steep.sum() + 4 * flat.sum()
        return slope + 100 * steep.square().sum() + 8 * flat.square().sum()


def test_gains_of_finite_steps_are_true_and_spread() -> None:
    """To first order an entry of the steep bias is worth 100 and one of the flat bias 16: all goes to the steep one.

    Its minimum is near: it takes off g^2 / 2F = 1/4 an entry, the flat one 1/2. Predicted from finite steps, the plan
    buys the flat one, and its gain is the decrease of the loss when the bought entries are trained to the minimum.
    """
    model = nn.ModuleList([nn.Linear(1, 4), nn.Linear(1, 4)]).double()
    for part in model:
        nn.init.zeros_(part.bias)
    sites = tuple(Site(str(i), str(i), "linear", (4, 1), True, i, "mlp.fc1", ("bias",)) for i in range(2))
    catalog, task, budget = Catalog(sites, (), 16, 0, 2), Quadratic(), Budget(4)

    def planned(scorer: Scorer) -> tuple[set[str], float, float]:
        scores = scorer.score(model, catalog, task)  # type: ignore[arg-type]  # what scoring asks of a task
        known = energies(catalog, {"sparse": Sparse("bias")}, scores, budget=budget)
        policy = GainPolicy(1.0, calibration={})
        menu = build_menu(catalog, {"sparse": Sparse("bias")}, scores, policy, budget=budget, energies=known)
        plan = Knapsack().allocate(menu, budget)
        (batch,) = task.batches("inner")
        trained = copy.deepcopy(model)
        for o in plan:
            g, f = ((10, 200), (4, 16))[int(o.site)]
            with torch.no_grad():
                trained.get_submodule(o.site).bias[: o.size] = -g / f
        with torch.no_grad():
            drop = float(task.loss(model, batch) - task.loss(trained, batch))
        return {o.site for o in plan}, plan.gain * known.total, drop

    first, _, poor = planned(Gradient(batch_size=1))
    finite, predicted, drop = planned(
        Calibrated(Gradient(batch_size=1), damping=1e-9, reach=1e9, folds=0, preconditioner="diagonal")
    )
    assert (first, finite) == ({"0"}, {"1"})
    assert (poor, drop) == pytest.approx((1.0, 2.0))
    assert predicted == pytest.approx(drop, rel=0.05)
    # Steps that end earlier are worth less, and the steep place is then the better one: 10 t - 100 t^2 against 4 t.
    early, short, _ = planned(
        Calibrated(Gradient(batch_size=1), damping=1e-9, reach=0.01, folds=0, preconditioner="diagonal")
    )
    assert early == {"0"}
    assert short == pytest.approx(4 * (10 * 0.01 - 100 * 0.01**2), rel=0.1)
