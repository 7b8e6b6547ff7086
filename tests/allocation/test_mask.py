from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from autopeft.allocation.gain import GainPolicy, build_menu
from autopeft.allocation.mask import Mask
from autopeft.core.budget import Budget, Cost
from autopeft.core.contracts import Allocator, Method
from autopeft.core.menu import Menu, Option
from autopeft.core.places import places_of
from autopeft.core.site import Catalog, Fused, Place, Site
from autopeft.errors import InfeasibleBudget, UsageError
from autopeft.methods.diffit import DiffFit
from autopeft.methods.full import Full
from autopeft.methods.lora import LoRA
from autopeft.methods.svdiff import SVDiff
from autopeft.testing.allocator_laws import AllocatorLaws


def priced(catalog: Catalog, methods: Mapping[str, Method], fused: Fused = "whole", limit: int = 10**9) -> Menu:
    """Every option of the methods below a price, without gains."""
    sites = {s.name: s for s in catalog.offered(fused)}
    options = [
        Option(s.name, key, size, cost, 0.0, places)
        for s in sites.values()
        for key, method in methods.items()
        if (places := places_of(catalog, method, s))
        for size in method.sizes(s)
        if (cost := method.cost(s, size)).trainable <= limit
    ]
    return Menu(tuple(options), sites)


def toy(prices: Mapping[str, int], gains: Mapping[str, float] | None = None) -> Menu:
    """One site and one option per group `a`, `b`, ...; every option of its own method-free price and gain."""
    sites = {f"{n}.w": Site(f"{n}.w", f"{n}.w", "linear", (2, 2), False, 0, "other", ("weight",)) for n in prices}
    options = [
        Option(f"{n}.w", "m", 1, Cost.plain(price, 4), (gains or {}).get(n, 0.0), (Place(f"{n}.w", "weight"),))
        for n, price in prices.items()
    ]
    return Menu(tuple(options), sites)


def toy_mask(menu: Menu, **settings: Any) -> Mask:
    return Mask(groups={name[0]: (f"{name[0]}.*",) for name in menu.sites}, **settings)


class TestLaws(AllocatorLaws):
    @pytest.fixture(autouse=True)
    def _menus(self, small_menus: list[tuple[Menu, Budget]]) -> None:
        self.small = small_menus

    def make(self) -> Allocator:
        return Mask()

    def menus(self) -> Iterator[tuple[Menu, Budget]]:
        yield from self.small


class TestLawsOfARoleMask(TestLaws):
    def make(self) -> Allocator:
        return Mask("roles", bits={"norm": 0}, weights={"norm": 3.0}, methods={"lora": ("*",), "bias": ("*",)})


def test_every_mask_of_four_bits_is_what_its_bits_say() -> None:
    prices = {"a": 1, "b": 2, "c": 4, "d": 8}
    menu = toy(prices)
    for bits in itertools.product((0, 1), repeat=4):
        mask = toy_mask(menu, bits=dict(zip(prices, bits, strict=True)))
        plan = mask.allocate(menu, Budget(15))
        assert {o.site[0] for o in plan} == {n for n, bit in zip(prices, bits, strict=True) if bit}
        assert plan.spent == sum(price for price, bit in zip(prices.values(), bits, strict=True) if bit)


@pytest.mark.parametrize("weights", [{}, {"a": 3.0, "c": 0.5}, {"d": 0.0}])
def test_the_repair_keeps_the_best_groups(weights: dict[str, float]) -> None:
    prices = {"a": 3, "b": 5, "c": 4, "d": 7, "e": 6}
    gains = {"a": 1.0, "b": 2.5, "c": 2.0, "d": 3.0, "e": 2.0}
    menu = toy(prices, gains)
    on = [n for n in prices if n != "b"]
    for limit in range(3, 21):
        plan = toy_mask(menu, bits={"b": 0}, weights=weights).allocate(menu, Budget(limit))
        worth = {n: weights.get(n, 1.0) * gains[n] for n in on}
        best = max(
            sum(worth[n] for n in kept)
            for k in range(5)
            for kept in itertools.combinations(on, k)
            if sum(prices[n] for n in kept) <= limit
        )
        kept = {o.site[0] for o in plan}
        assert plan.spent <= limit
        assert "b" not in kept
        assert sum(worth[n] for n in kept) == pytest.approx(best)


def test_without_gains_every_group_counts_alike() -> None:
    menu = toy({"a": 5, "b": 2, "c": 2})
    assert {o.site[0] for o in toy_mask(menu).allocate(menu, Budget(5))} == {"b", "c"}


def test_a_mask_that_must_not_be_repaired_is_refused() -> None:
    menu = toy({"a": 5, "b": 2})
    strict = toy_mask(menu, over="refuse")
    assert strict.allocate(menu, Budget(7)).spent == 7
    with pytest.raises(InfeasibleBudget, match="costs 7") as caught:
        strict.allocate(menu, Budget(6))
    assert caught.value.cheapest == 7


def test_nothing_on_buys_nothing_and_nothing_affordable_says_so() -> None:
    menu = toy({"a": 5, "b": 3})
    assert len(toy_mask(menu, bits={"a": 0, "b": "off"}).allocate(menu, Budget(1))) == 0
    with pytest.raises(InfeasibleBudget, match="the cheapest costs 3") as caught:
        toy_mask(menu).allocate(menu, Budget(2))
    assert caught.value.cheapest == 3


def test_sizes_shrink_before_groups_go(vit: Catalog) -> None:
    menu = priced(vit, {"lora": LoRA()})
    whole = {size: sum(o.cost.trainable for o in menu if o.size == size) for size in (1, 2, 4)}
    for size in (1, 2, 4):
        plan = Mask(methods={"lora": ("blocks.*",)}).allocate(menu, Budget(whole[size]))
        assert {o.size for o in plan} == {size}
    capped = Mask(methods={"lora": ("blocks.*",)}, sizes={"lora": 2}).allocate(menu, Budget(10**6))
    assert {o.size for o in capped} == {2}
    dropped = Mask(methods={"lora": ("blocks.*",)}).allocate(menu, Budget(whole[1] * 2 // 3))
    assert {o.size for o in dropped} == {1}
    assert 0 < len({vit[o.site].depth for o in dropped}) < vit.n_depth


def test_a_bit_may_choose_a_method(vit: Catalog) -> None:
    menu = priced(vit, {"lora": LoRA(), "svdiff": SVDiff(), "full": Full()})
    bits = {"block0": "lora", "block1": "svdiff"}
    plan = Mask(bits=bits).allocate(menu, Budget(10**7))
    found = {(vit[o.site].depth, o.method) for o in plan}
    assert {(0, "lora"), (1, "svdiff")} <= found
    assert not {(0, "svdiff"), (0, "full"), (1, "lora"), (1, "full")} & found


def test_a_method_on_a_block_as_a_whole(vit: Catalog) -> None:
    menu = priced(vit, {"diffit": DiffFit(), "lora": LoRA()})
    plan = Mask(bits={"block0": 0}, methods={"diffit": ("block:*",)}).allocate(menu, Budget(10**6))
    assert [o.site for o in plan] == [f"block:{d}" for d in range(1, vit.n_depth)]


def test_a_group_with_a_site_that_cannot_pay_goes_whole(vit: Catalog) -> None:
    dearest = max(o.cost.trainable for o in priced(vit, {"full": Full()}))
    plenty = Mask("blocks", methods={"full": ("blocks.*",)})
    assert plenty.allocate(priced(vit, {"full": Full()}), Budget(10**7)).spent > dearest
    with pytest.raises(InfeasibleBudget, match="none of the groups"):
        plenty.allocate(priced(vit, {"full": Full()}, limit=dearest - 1), Budget(dearest - 1))


def test_the_first_method_has_the_place(vit: Catalog) -> None:
    menu = priced(vit, {"lora": LoRA(), "full": Full()})
    for first, other in (("lora", "full"), ("full", "lora")):
        plan = Mask(methods={first: ("*",), other: ("*",)}).allocate(menu, Budget(10**7))
        matrices = {o.method for o in plan if vit[o.site].is_matrix}
        assert matrices == {first}


def test_layouts_follow_the_model(vit: Catalog, convnet: Catalog) -> None:
    for catalog in (vit, convnet):
        knobs = [k.path for k in Mask().space(catalog.offered())]
        blocks = [s for s in catalog if s.kind == "block"]
        assert knobs == [f"allocator.bits.block{b.depth}" for b in blocks]
    attention = Mask("attention").space(vit.offered("both"), ["lora"])
    assert [k.path for k in attention] == [f"allocator.bits.attention{d}" for d in range(vit.n_depth)]
    assert {k.choices for k in attention} == {("off", "on", "lora")}
    assert [k.path for k in Mask("stages").space(vit.offered())] == ["allocator.bits.stage0"]
    assert {k.path for k in Mask("roles").space(vit.offered())} >= {"allocator.bits.qkv", "allocator.bits.mlp"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layout": "rooms"}, "'rooms'"),
        ({"over": "never"}, "'never'"),
        ({"weights": {"a": -1.0}}, "at least 0"),
        ({"weights": {"a": float("nan")}}, "at least 0"),
        ({"sizes": {"lora": 0}}, "at least 1"),
        ({"bits": {"a": 2}}, "0, 1 or the key"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Mask(**settings)


def test_what_does_not_belong_to_the_model_is_refused() -> None:
    menu = toy({"a": 5, "b": 3})
    with pytest.raises(UsageError, match="'z', which is none of its groups: a, b"):
        toy_mask(menu, bits={"z": 0}).allocate(menu, Budget(9))
    with pytest.raises(UsageError, match="names 'lora'"):
        toy_mask(menu, bits={"a": "lora"}).allocate(menu, Budget(9))
    with pytest.raises(UsageError, match=r"a\.w lies in the groups one and two"):
        Mask(groups={"two": ("a.*",), "one": ("*",)}).allocate(menu, Budget(9))


def test_two_groups_cannot_share_a_fused_projection(vit: Catalog) -> None:
    menu = priced(vit, {"lora": LoRA()}, "both")
    mask = Mask(groups={"whole": ("*.qkv",), "query": ("*.qkv[[]q]",)})
    with pytest.raises(UsageError, match="two groups of the mask ask for lora"):
        mask.allocate(menu, Budget(10**6))


def test_gains_come_from_the_menu(vit: Catalog, scores_of: Any) -> None:
    scores = scores_of(vit.sites)
    budget = Budget(300)
    menu = build_menu(vit, {"lora": LoRA(), "svdiff": SVDiff()}, scores, GainPolicy(), budget=budget)
    plan = Mask(methods={"svdiff": ("*",)}).allocate(menu, budget)
    assert 0 < plan.spent <= 300
    assert plan.provenance.scorer == "hand-made"


def test_attentions_of_an_unconditional_u_net_have_bits_and_other_models_none() -> None:
    names = [
        "down_blocks.1.attentions.0.to_q",
        "down_blocks.1.attentions.0.to_k",
        "down_blocks.1.resnets.0.conv1",
        "mid_block.attentions.0.to_q",
        "up_blocks.0.attentions.1.to_q",
    ]
    sites = [Site(n, n, "linear", (2, 2), False, 0, "other", ("weight",)) for n in names]
    knobs = [knob.path for knob in Mask(layout="unet_attention").space(sites)]
    assert knobs == [f"allocator.bits.{bit}" for bit in ("down1_0", "mid0", "up0_1")]
    # Where attentions hold transformer blocks, what lies beside those has no bit.
    deep = [Site(n := f"mid_block.attentions.0.{end}", n, "linear", (2, 2), False, 0, "other", ("weight",))
            for end in ("proj_in", "transformer_blocks.0.attn1.to_q")]  # fmt: skip
    menu = Menu(tuple(Option(s.name, "m", 1, Cost.plain(1, 4), 1.0, (Place(s.name, "weight"),)) for s in deep),
                {s.name: s for s in deep})  # fmt: skip
    bought = Mask(layout="unet_attention").allocate(menu, Budget(2))
    assert [o.site for o in bought] == ["mid_block.attentions.0.transformer_blocks.0.attn1.to_q"]
    with pytest.raises(UsageError, match=r"unet_attention.*no group.*blocks, stages"):
        Mask(layout="unet_attention").allocate(toy({"a": 1}), Budget(2))
