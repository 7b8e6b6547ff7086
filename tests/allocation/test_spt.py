from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from autopeft.allocation.spt import SPT
from autopeft.backends.native import Native
from autopeft.core.allocation import Allocation
from autopeft.core.budget import Budget
from autopeft.core.contracts import Allocator, Method
from autopeft.core.menu import Menu
from autopeft.core.scores import Evidence, ScoreOrigin, Scores, TensorEvidence
from autopeft.core.site import Catalog, Site
from autopeft.errors import InfeasibleBudget, UsageError
from autopeft.testing.allocator_laws import AllocatorLaws
from autopeft.testing.tiny import tiny_vit


class TestLaws(AllocatorLaws):
    @pytest.fixture(autouse=True)
    def _menus(self, small_menus: list[tuple[Menu, Budget]]) -> None:
        self.small = small_menus

    def make(self) -> Allocator:
        return SPT()

    def menus(self) -> Iterator[tuple[Menu, Budget]]:
        yield from self.small


class TestLawsOfEntriesAlone(TestLaws):
    def make(self) -> Allocator:
        return SPT(structured=None, beta=None, tokens=False)


class TestLawsOfModulesAlone(TestLaws):
    def make(self) -> Allocator:
        return SPT(structured="adapter", rank=1, structured_only=True)


def menu_of(sites: Mapping[str, Site], scores: Mapping[tuple[str, str], Tensor]) -> Menu:
    evidence: dict[str, Evidence] = {}
    for name, site in sites.items():
        slots = {slot: TensorEvidence(t, t, t) for (at, slot), t in scores.items() if at == name}
        if slots:
            evidence[name] = Evidence(site, slots)
    return Menu((), dict(sites), Scores(ScoreOrigin("hand-made", 1, ""), {}, evidence))


def one_tensor(kind: str, shape: tuple[int, ...], slot: str) -> Menu:
    """A model of one eligible tensor with distinct scores."""
    site = Site("s", "s", kind, shape, True, 0, "mlp.fc1", ("weight", "bias", "output"))  # type: ignore[arg-type]
    held = shape[:1] if slot == "bias" else shape
    n = math.prod(held)
    return menu_of({"s": site}, {("s", slot): torch.randperm(n, dtype=torch.float64).reshape(held)})


# ---------------------------------------------------------------- T6: where the decision flips


@pytest.mark.parametrize(
    ("kind", "shape", "slot", "structured", "whole", "flips_at"),
    [
        ("linear", (768, 768), "weight", "lora", 12_288, 1229),
        ("linear", (3072, 768), "weight", "lora", 30_720, 3072),
        ("linear", (768, 3072), "weight", "lora", 30_720, 3072),
        ("linear", (768, 768), "weight", "adapter", 13_064, 1307),
        ("linear", (768, 3072), "weight", "adapter", 13_064, 1307),
        ("linear", (3072, 768), "weight", "adapter", 52_232, 5224),
        ("layer_norm", (768,), "weight", "lora", 768, 154),
        ("layer_norm", (768,), "bias", "lora", 768, 154),
        ("linear", (3072, 8), "bias", "lora", 3072, 615),
    ],
)
def test_the_decision_flips_exactly(
    kind: str, shape: tuple[int, ...], slot: str, structured: str, whole: int, flips_at: int
) -> None:
    menu = one_tensor(kind, shape, slot)
    spt = SPT(structured=structured)
    # One parameter short of the whole, everything below the flip is affordable, and the flip itself is not.
    (entries,) = spt.allocate(menu, Budget(whole - 1)).options
    assert entries.method in ("sparse", "sparse_bias")
    assert entries.size == entries.cost.trainable == flips_at - 1
    (module,) = spt.allocate(menu, Budget(whole)).options
    assert module.method in (structured, "vector", "bias")
    assert module.cost.trainable == whole
    assert module.indices is None


def test_thresholds_follow_alpha_beta_and_rank() -> None:
    matrix, vector = one_tensor("linear", (768, 768), "weight"), one_tensor("layer_norm", (768,), "weight")
    assert SPT(alpha=3.0, rank=4).allocate(matrix, Budget(6143)).spent == 2047  # 6,144 / 3 = 2,048
    assert SPT(beta=2.0).allocate(vector, Budget(767)).spent == 383
    assert SPT(beta=None).allocate(vector, Budget(767)).spent == 767
    assert SPT(structured=None).allocate(matrix, Budget(500_000)).spent == 500_000


# ---------------------------------------------------------------- T7: the built model has what was counted


def vit_menu(vit: Catalog, scores: Scores, fused: str = "slices") -> Menu:
    return Menu((), {s.name: s for s in vit.candidates(fused)}, scores)  # type: ignore[arg-type]


@pytest.mark.parametrize("limit", [20, 150, 700, 2_500])
def test_the_built_model_trains_what_was_counted(
    vit: Catalog, methods: Mapping[str, Method], scores_of: Callable[..., Scores], limit: int
) -> None:
    plan = SPT(methods=methods).allocate(vit_menu(vit, scores_of(vit.sites)), Budget(limit))
    modules = sum(o.cost.trainable for o in plan if o.method == "lora")
    vectors = sum(o.cost.trainable for o in plan if o.method in ("vector", "bias"))
    entries = sum(len(o.indices or ()) for o in plan)  # type: ignore[arg-type]
    token = sum(o.cost.trainable for o in plan if o.method == "tokens")
    assert plan.spent == modules + vectors + entries + token
    assert token == 16
    model = tiny_vit()
    with Native().insert(model, vit, plan, methods) as inserted:
        groups = inserted.groups()
        built = sum(p.numel() for key, group in groups.items() if key != "head" for p in group)
        assert built == inserted.trainable_count() == plan.spent


# ---------------------------------------------------------------- T8: within, monotone, maximal


def test_largest_total_within_the_budget(vit: Catalog, scores_of: Callable[..., Scores]) -> None:
    """Every tau in turn gives the total by its definition; the allocator finds the largest that fits."""
    scores = scores_of(vit.sites)
    menu = vit_menu(vit, scores)
    totals = totals_by_definition(menu, rank=8, alpha=10, beta=5, token=16)
    assert totals == sorted(totals)
    jumps = {b - a for a, b in pairwise(totals)}
    assert {0, 1} < jumps
    for limit in range(16, totals[-1] + 40, 131):
        spent = SPT().allocate(menu, Budget(limit)).spent
        assert spent == max(t for t in totals if t <= limit)


def totals_by_definition(menu: Menu, rank: int, alpha: float, beta: float, token: int) -> list[int]:
    """The total for every tau: sort all entries, count per tensor, apply the two thresholds."""
    assert menu.scores is not None
    entries, rules = [], []
    for name, site in menu.sites.items():
        if site.kind not in ("linear", "layer_norm") or site.role == "stem":
            continue
        for slot in ("weight", "bias"):
            score = menu.scores.evidence[name][slot].score.flatten().tolist()
            matrix = slot == "weight" and site.kind == "linear"
            largest = min(rank, 1 << int(math.log2((site.n_weight - 1) // sum(site.shape)))) if matrix else 0
            whole = sum(site.shape) * largest if matrix else len(score)
            entries += [(-s, len(rules)) for s in score]
            rules.append((whole, alpha if matrix else beta))
    counts = [0] * len(rules)
    totals = [token]
    for _, owner in sorted(entries):
        before, after = (
            rules[owner][0] if n and n * rules[owner][1] >= rules[owner][0] else n
            for n in (counts[owner], counts[owner] + 1)
        )
        counts[owner] += 1
        totals.append(totals[-1] + after - before)
    return totals


def test_no_budget_buys_nothing_and_a_huge_one_everything(vit_b: Catalog) -> None:
    by_shape: dict[tuple[int, ...], Tensor] = {}
    scores = {}
    generator = torch.Generator().manual_seed(0)
    sites = {s.name: s for s in vit_b.candidates("slices")}
    for site in sites.values():
        if site.kind in ("linear", "layer_norm") and site.role != "stem":
            for slot, shape in (("weight", site.shape), ("bias", site.shape[:1])):
                if shape not in by_shape:
                    by_shape[shape] = torch.rand(shape, generator=generator)
                scores[site.name, slot] = by_shape[shape]
    menu = menu_of(sites, scores)
    plan = SPT().allocate(menu, Budget(10**8))
    spent = Counter[str]()
    for option in plan:
        spent[option.method] += option.cost.trainable
    # 12 x (4 x 12,288 + 2 x 30,720) in LoRA; 82,944 biases of matrices and 25 x 768 of norms; 25 x 768 norm weights.
    assert spent == {"lora": 1_327_104, "bias": 82_944 + 19_200, "vector": 19_200, "tokens": 768}
    assert plan.provenance.allocator.endswith("tau=85056000)")


def test_without_any_budget(vit: Catalog, scores_of: Callable[..., Scores]) -> None:
    menu = vit_menu(vit, scores_of(vit.sites))
    assert SPT().allocate(menu, Budget(0)).options == ()
    assert [o.method for o in SPT(structured_only=True).allocate(menu, Budget(16))] == ["tokens"]
    # 15 do not pay for the class token, which is then left out.
    assert SPT().allocate(menu, Budget(15)).spent == 15
    assert "tokens" not in {o.method for o in SPT().allocate(menu, Budget(15))}


def test_structured_only_leaves_the_entries_out(vit: Catalog, scores_of: Callable[..., Scores]) -> None:
    menu = vit_menu(vit, scores_of(vit.sites))
    plan = SPT(structured_only=True).allocate(menu, Budget(700))
    assert 0 < plan.spent <= 700
    assert not {o.method for o in plan} & {"sparse", "sparse_bias"}


# ---------------------------------------------------------------- T10: permutations and limits of alpha


def chosen(plan: Allocation) -> dict[str, tuple[int, tuple[int, ...]]]:
    return {o.key: (o.size, tuple(o.indices.values.tolist()) if o.indices else ()) for o in plan}


def test_the_order_of_the_parameters_does_not_matter(vit: Catalog, scores_of: Callable[..., Scores]) -> None:
    scores = scores_of(vit.sites)
    menu = vit_menu(vit, scores)
    backwards = Menu(
        (),
        dict(reversed(menu.sites.items())),
        Scores(scores.origin, scores.totals, dict(reversed(scores.evidence.items()))),
    )
    assert chosen(SPT().allocate(menu, Budget(900))) == chosen(SPT().allocate(backwards, Budget(900)))


def test_without_modules_the_total_is_tau_and_the_token(vit: Catalog, scores_of: Callable[..., Scores]) -> None:
    scores = scores_of(vit.sites)
    menu = vit_menu(vit, scores)
    plan = SPT(structured=None, beta=None).allocate(menu, Budget(516))
    assert plan.spent == 516
    assert plan.provenance.allocator.endswith("tau=500)")
    # They are the 500 largest of all eligible entries.
    picked, everything = [], []
    for option in plan:
        if option.indices is not None:
            score = scores.evidence[option.site][option.places[0].slot].score.flatten()
            picked += score[torch.from_numpy(option.indices.values.copy())].tolist()
    for site in menu.sites.values():
        if site.kind in ("linear", "layer_norm") and site.role != "stem":
            for slot in ("weight", "bias"):
                everything += scores.evidence[site.name][slot].score.flatten().tolist()
    assert sorted(picked, reverse=True) == sorted(everything, reverse=True)[:500]


def test_with_a_huge_alpha_every_touched_matrix_gets_a_module(vit: Catalog, scores_of: Callable[..., Scores]) -> None:
    plan = SPT(alpha=1e9, beta=1e9).allocate(vit_menu(vit, scores_of(vit.sites)), Budget(1_500))
    assert len(plan) > 4
    assert {o.method for o in plan} <= {"lora", "vector", "bias", "tokens"}


def test_a_whole_projection_and_its_slices_are_one_tensor(vit: Catalog, scores_of: Callable[..., Scores]) -> None:
    scores = scores_of(vit.sites)
    slices = SPT().allocate(vit_menu(vit, scores, "slices"), Budget(900))
    assert SPT().allocate(vit_menu(vit, scores, "both"), Budget(900)) == slices
    whole = SPT(structured=None, beta=None).allocate(vit_menu(vit, scores, "whole"), Budget(4_000))
    assert all(len(o.places) == 3 for o in whole if o.site.endswith("qkv"))
    assert any(o.site.endswith("qkv") for o in whole)


# ---------------------------------------------------------------- the released rule


def sweep_menu() -> Menu:
    """One matrix of 1,000 x 1,000: the scaled sweep looks at multiples of 20,000 x 1,000,000 / 85,056,000 = 235.1."""
    return one_tensor("linear", (1000, 1000), "weight")


def test_released_rule_takes_the_nearest_of_its_sweep() -> None:
    spt = SPT(structured=None, rule="released_nearest")
    # Totals are ceil(235.14 i): 236, 471, 706, 941, ...
    assert spt.allocate(sweep_menu(), Budget(480)).spent == 471
    with pytest.raises(InfeasibleBudget, match="overshoots 690 trainable parameters by 16") as caught:
        spt.allocate(sweep_menu(), Budget(690))
    assert caught.value.cheapest == 706
    assert SPT(structured=None).allocate(sweep_menu(), Budget(690)).spent == 690


def test_released_rule_writes_nothing_beyond_a_factor_of_two() -> None:
    spt = SPT(structured=None, rule="released_nearest")
    with pytest.raises(InfeasibleBudget, match="within a factor of two"):
        spt.allocate(sweep_menu(), Budget(117))
    with pytest.raises(InfeasibleBudget, match="overshoots"):
        spt.allocate(sweep_menu(), Budget(118))


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"alpha": 0.9}, "alpha"),
        ({"alpha": math.nan}, "alpha"),
        ({"beta": 0.5}, "beta"),
        ({"rank": 0}, "rank"),
        ({"rule": "nearest"}, "rule"),
        ({"methods": {"core": None}}, "structured method 'lora'"),
    ],
)
def test_settings_out_of_range(settings: dict[str, object], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        SPT(**settings)  # type: ignore[arg-type]


def test_menus_without_scores_are_refused(vit: Catalog) -> None:
    with pytest.raises(UsageError, match="score the model"):
        SPT().allocate(Menu((), {s.name: s for s in vit.sites}), Budget(5))


def test_nothing_fits(small_menus: list[tuple[Menu, Budget]]) -> None:
    menu, _ = small_menus[2]
    with pytest.raises(InfeasibleBudget, match="buys nothing by the rules of spt"):
        SPT(structured_only=True).allocate(menu, Budget(3))


def test_in_other_units_the_plan_fits(vit: Catalog, scores_of: Callable[..., Scores]) -> None:
    menu = vit_menu(vit, scores_of(vit.sites))
    for unit, limit in (("entries", 700), ("bytes", 20_000)):
        plan = SPT().allocate(menu, Budget(limit, unit))  # type: ignore[arg-type]
        assert limit // 2 < plan.spent <= limit
