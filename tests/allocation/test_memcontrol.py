"""MemControl's masks on the U-Net of Stable Diffusion 1.5, against the counts of its released code."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from autopeft.allocation.mask import Mask
from autopeft.config.decode import study_from_dict, study_from_yaml, study_to_dict
from autopeft.config.override import override
from autopeft.config.spaces import load_space
from autopeft.core.allocation import Allocation
from autopeft.core.budget import Budget
from autopeft.core.contracts import Method
from autopeft.core.menu import Menu, Option
from autopeft.core.places import places_of
from autopeft.core.site import Catalog
from autopeft.errors import InfeasibleBudget
from autopeft.methods.bias import Bias
from autopeft.methods.full import Full
from autopeft.methods.gamma import Gamma
from autopeft.methods.norm import Norm
from autopeft.methods.svdiff import SVDiff
from autopeft.models.scan import scan

METHODS: Mapping[str, Mapping[str, Method]] = {
    "memcontrol_svdiff": {"svdiff": SVDiff(norms=True)},
    "memcontrol_difffit": {"gamma": Gamma(), "norm": Norm(), "bias": Bias()},
    "memcontrol_attention": {"full": Full()},
}

WIDTHS = (320, 320, 640, 640, 1280, 1280, 1280, 1280, 1280, 640, 640, 320, 320)
"""Channels of the 13 attentions that have a bit in two of the modes."""

PLENTY = Budget(859_520_964)


@pytest.fixture(scope="module")
def unet() -> Catalog:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        model = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    # A denoiser has no classifier.
    model.get_classifier = lambda: None
    catalog = scan(model)
    assert catalog.n_base == PLENTY.limit == sum(p.numel() for p in model.parameters())
    return catalog


@pytest.fixture(scope="module")
def menus(unet: Catalog) -> Mapping[str, Menu]:
    sites = {s.name: s for s in unet.offered()}
    return {
        layout: Menu(
            tuple(
                Option(s.name, key, 1, method.cost(s, 1), 0.0, places)
                for s in unet
                for key, method in methods.items()
                if (places := places_of(unet, method, s))
            ),
            sites,
        )
        for layout, methods in METHODS.items()
    }


def bits_of(layout: str) -> list[str]:
    return [k.path.removeprefix("allocator.bits.") for k in load_space(layout) if k.path.startswith("allocator.bits.")]


def spend(layout: str, menu: Menu, off: tuple[str, ...] = (), budget: Budget = PLENTY) -> Allocation:
    return Mask(layout, bits=dict.fromkeys(off, 0)).allocate(menu, budget)


@pytest.mark.parametrize(
    ("layout", "n_bits", "all_on", "all_off", "per_bit"),
    [
        (
            "memcontrol_svdiff",
            13,
            222_805,
            125_486,
            [{320: 3203, 640: 6403, 1280: 11_779}[w] for w in WIDTHS],
        ),
        # 11 vectors: q, k, v and the output of two attentions; behind both and behind the feed-forward.
        ("memcontrol_difffit", 13, 581_124, 468_484, [11 * w for w in WIDTHS]),
        # Self-attention 4 w^2 + w, cross-attention 2 w^2 + 2 * 768 w + w.
        (
            "memcontrol_attention",
            16,
            267_239_360,
            173_702_720,
            [6 * w * w + 1538 * w for w in (*WIDTHS[:7], *(1280,) * 3, *(640,) * 3, *(320,) * 3)],
        ),
    ],
)
def test_counts_of_the_released_code(
    menus: Mapping[str, Menu], layout: str, n_bits: int, all_on: int, all_off: int, per_bit: list[int]
) -> None:
    menu, bits = menus[layout], bits_of(layout)
    assert len(bits) == n_bits
    assert spend(layout, menu).spent == all_on
    assert spend(layout, menu, tuple(bits)).spent == all_off
    assert [all_on - spend(layout, menu, (bit,)).spent for bit in bits] == per_bit


def test_the_bits_are_those_of_the_layout(unet: Catalog) -> None:
    for layout in METHODS:
        assert bits_of(layout) == [k.path.removeprefix("allocator.bits.") for k in Mask(layout).space(unet)]


def test_a_bit_switches_one_attention_and_nothing_beside_it(menus: Mapping[str, Menu]) -> None:
    for layout, inside in {
        "memcontrol_svdiff": "up_blocks.2.attentions.1.transformer_blocks.0.",
        "memcontrol_difffit": "up_blocks.2.attentions.1.transformer_blocks.0.",
        "memcontrol_attention": "up_blocks.2.attentions.1.transformer_blocks.0.attn",
    }.items():
        whole, masked = ({(o.site, o.method) for o in spend(layout, menus[layout], off)} for off in ((), ("up2_1",)))
        gone = whole - masked
        assert not masked - whole
        assert gone == {(s, m) for s, m in whole if s.startswith(inside) and m not in ("norm", "bias")}
        assert gone


def test_the_published_share_is_a_hard_budget_here(menus: Mapping[str, Menu]) -> None:
    # 0.019 % of the parameters: a full mask is repaired into it, where the released code has no budget at all.
    budget = Budget.parse("0.019%", PLENTY.limit)
    plan = spend("memcontrol_svdiff", menus["memcontrol_svdiff"], budget=budget)
    assert budget.limit == 163_308
    kept = plan.spent - 125_486
    # Without gains every group counts alike, so the most groups stay: the cheapest, 4 of 3,203 and 3 of 6,403.
    assert (plan.spent, kept) == (125_486 + 4 * 3203 + 3 * 6403, 4 * 3203 + 3 * 6403)
    with pytest.raises(InfeasibleBudget, match="125,486") as caught:
        spend("memcontrol_svdiff", menus["memcontrol_svdiff"], budget=Budget(125_485))
    assert caught.value.cheapest == 125_486


def test_the_spaces_carry_the_learning_rate() -> None:
    for layout, family in {"svdiff": "core", "difffit": "vector", "attention": "dense"}.items():
        (rate,) = [k for k in load_space(f"memcontrol_{layout}") if k.path.startswith("train.")]
        assert (rate.path, rate.low, rate.high, rate.log) == (f"train.lr.{family}", 1e-5, 1e-3, True)
        assert METHODS[f"memcontrol_{layout}"][rate_owner(layout)].family == family


def rate_owner(layout: str) -> str:
    return {"svdiff": "svdiff", "difffit": "gamma", "attention": "full"}[layout]


def test_a_study_file_and_its_knobs_reach_the_mask() -> None:
    study = study_from_yaml(
        "allocator: {type: mask, layout: memcontrol_svdiff, bits: {mid0: 0}}\n"
        "methods: {svdiff: {type: svdiff, norms: true}}\n"
    )
    assert study.allocator == Mask("memcontrol_svdiff", bits={"mid0": 0})
    assert study.methods == {"svdiff": SVDiff(norms=True)}
    point = dict.fromkeys((f"allocator.bits.{bit}" for bit in bits_of("memcontrol_svdiff")), 0)
    changed = override(study, {**point, "train.lr.core": 2e-4})
    assert isinstance(changed.allocator, Mask)
    assert not any(changed.allocator.bits.values())
    assert len(changed.allocator.bits) == 13
    assert study_from_dict(study_to_dict(changed)) == changed
