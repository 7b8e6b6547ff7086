"""Plans that are kept to one format, against every plan and what the exporter says of it."""

from __future__ import annotations

import copy
import itertools
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel

from autopeft.allocation.knapsack import Knapsack
from autopeft.backends.native import Native
from autopeft.config.limits import LimitSettings
from autopeft.core.allocation import Allocation
from autopeft.core.budget import Budget
from autopeft.core.cap import Cap, Term
from autopeft.core.menu import Menu, Option
from autopeft.core.places import places_of
from autopeft.errors import InfeasibleBudget
from autopeft.export.peft import PeftExport
from autopeft.export.timm import TimmExport
from autopeft.methods.bias import Bias
from autopeft.methods.bottleneck import BottleneckAdapter
from autopeft.methods.core import Core
from autopeft.methods.hf_peft import HfPeft
from autopeft.methods.lora import LoRA
from autopeft.pipeline.plan import best_of
from autopeft.pipeline.targets import limited_menus
from autopeft.testing._export_ground import small_vit

METHODS = {"lora": LoRA(), "core": Core(), "bias": Bias(), "ia3": HfPeft("ia3"), "adapter": BottleneckAdapter()}
WANTED = (
    ("blocks.0.mlp.fc1", "lora", 1),
    ("blocks.0.mlp.fc1", "lora", 2),
    ("blocks.0.mlp.fc1", "bias", 1),
    ("blocks.0.mlp.fc1", "ia3", 1),
    ("blocks.1.mlp.fc1", "core", 4),
    ("blocks.1.mlp.fc1", "ia3", 1),
    ("blocks.1.attn.qkv[q]", "lora", 2),
    ("blocks.1.attn.qkv[v]", "core", 2),
    ("blocks.1.attn.proj", "adapter", 2),
    ("blocks.1.attn.proj", "bias", 1),
    ("blocks.1.mlp.fc2", "ia3", 1),
)
BUDGET = Budget(1200)
"""Of which everything together takes about three times as much."""


@pytest.fixture(scope="module")
def ground():
    return small_vit()


@pytest.fixture(scope="module")
def offer(ground):
    """What `limited_menus` asks of a prepared model, and a small menu whose gains do not decide alone."""
    sites = {s.name: s for s in ground.catalog.offered("both")}
    options = tuple(
        Option(
            name,
            key,
            size,
            METHODS[key].cost(sites[name], size),
            float(METHODS[key].cost(sites[name], size).trainable ** 0.5 * (0.7 + 0.3 * (7 * i % 5))),
            places_of(ground.catalog, METHODS[key], sites[name]),
        )
        for i, (name, key, size) in enumerate(WANTED)
    )
    idents = [(o.site, o.method, o.size) for o in options]
    cap = Cap(
        "units",
        9.0,
        1.0,
        {ident: 1.0 + i % 3 for i, ident in enumerate(idents)},
        (Term(1.5), Term(1.0, 0)),
        {ident: (0 if ident[0].startswith("blocks.0") else 1,) for ident in idents},
        {ident: ((0, 0.5),) for ident in idents if ident[0].startswith("blocks.1")},
    )
    prepared = SimpleNamespace(model=ground.model, folders={}, budget=BUDGET)
    return prepared, Menu(options, sites, caps=(cap,))


def allowed(ground, menu, plan, target, rank) -> bool:
    """What the exporters and a person with a pencil say."""
    if sum(o.cost.trainable for o in plan) > BUDGET.limit or menu.caps[0].used(plan) > menu.caps[0].most:
        return False
    ranks = {}
    for o in plan:
        if o.method in ("lora", "core"):
            module = o.site.partition("[")[0]
            ranks[module] = ranks.get(module, 0) + o.size
    if rank is not None and max(ranks.values(), default=0) > rank:
        return False
    if target == "any":
        return True
    if target == "lora" and any(o.method not in ("lora", "core") for o in plan):
        return False
    exporter = TimmExport() if target == "timm" else PeftExport()
    with Native().insert(ground.model, ground.catalog, Allocation(plan, Budget(10**6)), METHODS) as inserted:
        return exporter.supports(inserted) == ""


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("target", ["any", "timm", "peft", "lora"])
def test_the_best_plan_of_every_plan(ground, offer, target, rank):
    prepared, menu = offer
    study = SimpleNamespace(limits=LimitSettings(target, rank), methods=METHODS)
    found = best_of(Knapsack(), limited_menus(prepared, study, menu), BUDGET, 0)
    best = 0.0
    for n in range(1, len(menu) + 1):
        for plan in itertools.combinations(menu.options, n):
            gain = sum(o.gain for o in plan)
            held = [place for o in plan for place in o.places]
            if gain > best + 1e-9 and len(held) == len(set(held)) and allowed(ground, menu, plan, target, rank):
                best = gain
    assert best > 0
    assert found.gain == pytest.approx(best, rel=1e-12)
    assert found.gap == 0
    assert allowed(ground, menu, found.options, target, rank)


def test_targets_differ(ground, offer):
    """So that the test above compares something."""
    prepared, menu = offer
    gains = {}
    for target in ("any", "timm", "peft", "lora"):
        study = SimpleNamespace(limits=LimitSettings(target, 3), methods=METHODS)
        gains[target] = best_of(Knapsack(), limited_menus(prepared, study, menu), BUDGET, 0).gain
    assert gains["any"] > gains["peft"] >= gains["lora"]
    assert gains["any"] >= gains["timm"] > gains["lora"]


def test_nothing_that_the_target_holds(offer):
    prepared, menu = offer
    study = SimpleNamespace(limits=LimitSettings("lora"), methods={"bias": Bias()})
    with pytest.raises(InfeasibleBudget, match=r"none of the methods bias has an option .* leave as 'lora'"):
        limited_menus(prepared, study, menu.only(["bias"]))


@pytest.mark.parametrize("target", ["peft", "lora"])
def test_a_plan_leaves_as_a_folder_that_peft_reads(ground, offer, target, tmp_path):
    prepared, menu = offer
    study = SimpleNamespace(limits=LimitSettings(target), methods=METHODS)
    plan = best_of(Knapsack(), limited_menus(prepared, study, menu), BUDGET, 0)
    base = copy.deepcopy(ground.model)
    with Native().insert(ground.model, ground.catalog, plan, METHODS) as inserted:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for part in inserted.named_adapters().values():
                for parameter in part.parameters():
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        PeftExport().export(inserted, ground.record, tmp_path)
        expected = ground.logits(inserted)
        moved = (inserted.model(ground.images) - base(ground.images)).abs().max()
    loaded = PeftModel.from_pretrained(base, str(tmp_path)).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(ground.images), expected, atol=1e-5, rtol=0)
    assert moved > 1e-2
