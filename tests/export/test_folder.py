"""What single options could be exported as, against what the exporter says of whole plans."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn

from autopeft.backends.native import Native
from autopeft.core.allocation import Allocation
from autopeft.core.budget import Budget
from autopeft.core.menu import Option
from autopeft.core.places import places_of
from autopeft.export.folder import LORA, Folder
from autopeft.export.peft import PeftExport
from autopeft.methods.bias import Bias
from autopeft.methods.core import Core
from autopeft.methods.hf_peft import HfPeft
from autopeft.methods.lora import LoRA
from autopeft.methods.norm import Norm
from autopeft.methods.ssf import SSF

METHODS = {
    "lora": LoRA(),
    "core": Core(),
    "bias": Bias(),
    "norm": Norm(),
    "ssf": SSF(),
    "ia3": HfPeft(tuner="ia3"),
    "vera": HfPeft(tuner="vera"),
    "dora": HfPeft(tuner="dora"),
    "peft_lora": HfPeft(),
}


@pytest.fixture(scope="module")
def offered(ground):
    """Every option of sizes 1 to 4 with its folder."""
    found = []
    for site in ground.catalog.offered("both"):
        for key, method in METHODS.items():
            places = places_of(ground.catalog, method, site)
            for size in [s for s in method.sizes(site) if s <= 4] if places else []:
                option = Option(site.name, key, size, method.cost(site, size), 1.0, places)
                host: nn.Module = ground.model.get_submodule(site.module)
                part = method.build(site, option, host, torch.Generator().manual_seed(0))
                found.append((option, Folder.of(part, ground.model)))
    return found


def refused(ground, options):
    """What the exporter says of a plan."""
    plan = Allocation(tuple(options), Budget(10**9))
    with Native().insert(ground.model, ground.catalog, plan, METHODS) as inserted:
        return PeftExport().supports(inserted)


def test_an_option_without_a_folder_is_refused_and_the_others_are_not(ground, offered):
    seen = set()
    for option, folder in offered:
        kind = (option.method, option.site.rpartition(".")[2])
        if kind not in seen:
            seen.add(kind)
            assert bool(refused(ground, [option])) == (not folder.kinds), option.key
    assert {o.method for o, f in offered if f.kinds} >= {"lora", "core", "ia3", "dora", "peft_lora"}
    assert {o.method for o, f in offered if not f.kinds} >= {"bias", "norm", "ssf", "vera"}


def test_plans_of_one_kind_are_one_folder(ground, offered):
    draw = random.Random(0)
    kinds = sorted({kind for _, folder in offered for kind in folder.kinds})
    assert LORA in kinds
    assert len(kinds) >= 3
    for kind in kinds:
        for _ in range(3):
            order = [o for o, folder in offered if kind in folder.kinds]
            draw.shuffle(order)
            taken, plan = set(), []
            for o in order:
                if not taken & set(o.places):
                    plan.append(o)
                    taken |= set(o.places)
            assert refused(ground, plan[: draw.randint(2, 9)]) == "", kind


def test_plans_of_two_kinds_are_not(ground, offered):
    by = {
        m: next((o, f) for o, f in offered if o.method == m and o.site.startswith(s))
        for m, s in (("lora", "blocks.0"), ("ia3", "blocks.1"))
    }
    (lora, one), (ia3, other) = by["lora"], by["ia3"]
    assert not one.kinds & other.kinds
    assert refused(ground, [lora, ia3])


def test_ranks_are_those_of_the_folder(offered):
    for option, folder in offered:
        if option.method in ("lora", "core", "peft_lora"):
            assert list(folder.ranks.values()) == [option.size]
