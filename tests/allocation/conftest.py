from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest
import torch

from autopeft.allocation import _exact
from autopeft.allocation._spt_parts import default_methods
from autopeft.allocation.gain import GainPolicy, build_menu
from autopeft.allocation.knapsack import Knapsack
from autopeft.core.allocation import Allocation
from autopeft.core.budget import Budget
from autopeft.core.contracts import Method
from autopeft.core.menu import Menu
from autopeft.core.scores import Evidence, ScoreOrigin, Scores, TensorEvidence
from autopeft.core.site import Catalog, Place, Site
from autopeft.models.scan import scan
from autopeft.testing.tiny import tiny_convnet, tiny_vit


def make_scores(sites: Iterable[Site], seed: int = 0, scale: float = 1.0) -> Scores:
    """Signals drawn per tensor, whatever the order of the sites; scores are their squares. Blocks have none."""
    evidence: dict[str, Evidence] = {}
    totals: dict[Place, float] = {}
    for site in sites:
        slots = {}
        for slot in ("weight", "bias", "tokens"):
            shape = site.shape[:1] if slot == "bias" else site.shape
            if slot not in site.slots or site.kind == "block":
                continue
            generator = torch.Generator().manual_seed(zlib.crc32(f"{site.name}:{slot}:{seed}".encode()))
            signal = scale * torch.randn(shape, generator=generator) ** 3
            slots[slot] = TensorEvidence(torch.randn(shape, generator=generator), signal, signal.square())
            totals[Place(site.name, slot)] = float(signal.square().sum())
        if slots:
            evidence[site.name] = Evidence(site, slots)
    return Scores(ScoreOrigin("hand-made", 1, ""), totals, evidence)


def pack_by_milp(menu: Menu, budget: Budget, **settings: Any) -> Allocation:
    """The plan by HiGHS alone: without the dynamic programming that comes before it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_exact, "_dynamic", lambda *args: None)
        return Knapsack(**settings).allocate(menu, budget)


@pytest.fixture(scope="session")
def by_milp() -> Callable[..., Allocation]:
    return pack_by_milp


@pytest.fixture(scope="session")
def scores_of() -> Callable[..., Scores]:
    return make_scores


@pytest.fixture(scope="session")
def methods() -> Mapping[str, Method]:
    return default_methods()


@pytest.fixture(scope="session")
def vit() -> Catalog:
    return scan(tiny_vit())


@pytest.fixture(scope="session")
def convnet() -> Catalog:
    return scan(tiny_convnet())


@pytest.fixture(scope="session")
def vit_b() -> Catalog:
    import timm

    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224")
    return scan(model)


@pytest.fixture(scope="session")
def small_menus(vit: Catalog, convnet: Catalog) -> list[tuple[Menu, Budget]]:
    """Menus of real methods on the two tiny models, with scores, at four budgets each."""
    found = []
    for catalog in (vit, convnet):
        scores = make_scores(catalog.sites)
        for limit in (1, 40, 300, 100_000):
            budget = Budget(limit)
            menu = build_menu(catalog, default_methods(), scores, GainPolicy(), fused="slices", budget=budget)
            found.append((menu, budget))
    return found
