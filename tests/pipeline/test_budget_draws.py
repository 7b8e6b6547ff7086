"""The hard guarantee: random draws of model, budget and knobs, each price counted four times."""

import dataclasses

import numpy as np
import pytest
import torch

from autopeft.allocation.energies import energies
from autopeft.allocation.gain import GainPolicy, build_menu
from autopeft.allocation.indices import attach_indices
from autopeft.allocation.knapsack import Knapsack
from autopeft.allocation.random import RandomMix
from autopeft.backends.native import Native
from autopeft.config.study import Study
from autopeft.core.budget import Budget
from autopeft.errors import BudgetMismatch
from autopeft.models.load import load_model
from autopeft.models.scan import scan
from autopeft.models.spec import ModelSpec
from autopeft.pipeline.trial import count_four_times
from autopeft.scoring.gradient import Gradient
from autopeft.testing.tiny import tiny_convnet, tiny_vit
from autopeft.testing.toy_task import ToyTask
from autopeft.training.checkpoint import save_adapter, trainable_in_file
from autopeft.training.optim import make_optimizer, optimised_count
from autopeft.training.settings import TrainSettings


def bundled():
    loaded = load_model(ModelSpec())
    loaded.reset_head(4, 0)
    return loaded.model


MODELS = {
    "vit": (tiny_vit, 8),
    "convnet": (tiny_convnet, 8),
    "bundled": (bundled, 28),
}


@pytest.fixture(scope="module")
def ready():
    methods = dict(Study().methods)
    found = {}
    for name, (make, size) in MODELS.items():
        model = make()
        catalog = scan(model)
        task = ToyTask(n_inner=16, size=size)
        scores = Gradient(max_batches=2).score(model, catalog, task, 0)
        everything = Budget(10**9)
        found[name] = {
            fused: (model, catalog, scores, energies(catalog, methods, scores, fused=fused, budget=everything))
            for fused in ("whole", "slices")
        }
    return methods, found


def draw(rng, methods):
    fused = str(rng.choice(["whole", "slices"]))
    policy = GainPolicy(
        exponent=float(rng.uniform(0.2, 1)),
        methods={key: float(np.exp(rng.uniform(-2, 2))) * bool(rng.random() < 0.7) for key in methods},
        roles={role: float(np.exp(rng.uniform(-1.4, 1.4))) for role in ("qkv", "proj", "mlp")},
        depth_tilt=float(rng.uniform(-2, 2)),
    )
    allocator = Knapsack() if rng.random() < 0.7 else RandomMix()
    return fused, policy, allocator


@pytest.mark.parametrize("draws", [100, pytest.param(500, marks=pytest.mark.slow)])
def test_four_counts_agree_and_never_exceed_the_budget(ready, tmp_path, draws):
    methods, found = ready
    rng = np.random.default_rng(0)
    well_spent = done = 0
    while done < draws:
        name = str(rng.choice(list(MODELS), p=[0.45, 0.35, 0.2]))
        fused, policy, allocator = draw(rng, methods)
        model, catalog, scores, energy = found[name][fused]
        limit = int(catalog.n_base * 10 ** rng.uniform(-3, -0.7))
        budget = Budget(max(limit, 1))
        menu = build_menu(catalog, methods, scores, policy, fused=fused, budget=budget, energies=energy)
        if not any(o.gain > 0 and o.cost.trainable <= budget.limit for o in menu):
            continue
        allocation = attach_indices(allocator.allocate(menu, budget, done), methods, scores)
        assert allocation.spent <= budget.limit
        with Native().insert(model, catalog, allocation, methods, seed=done) as inserted:
            optimizer = make_optimizer(inserted, TrainSettings(), methods)
            path = save_adapter(inserted, tmp_path / "adapter.safetensors")
            count_four_times(
                allocation, inserted.trainable_count(), optimised_count(optimizer), trainable_in_file(path)
            )
        well_spent += allocation.spent >= 0.9 * budget.limit
        done += 1
    assert well_spent >= draws / 2, well_spent


@pytest.mark.parametrize("position", range(3))
def test_a_count_that_disagrees_is_refused(ready, position):
    methods, found = ready
    _, catalog, scores, energy = found["vit"]["whole"]
    budget = Budget(200)
    menu = build_menu(catalog, methods, scores, GainPolicy(), budget=budget, energies=energy)
    allocation = Knapsack().allocate(menu, budget)
    counts = [allocation.trainable] * 3
    count_four_times(allocation, *counts)
    counts[position] += 1
    with pytest.raises(BudgetMismatch, match="disagree"):
        count_four_times(allocation, *counts)


def test_a_method_that_builds_more_than_it_costs_is_refused(ready):
    methods, found = ready
    model, catalog, scores, _ = found["vit"]["whole"]
    budget = Budget(400)
    menu = build_menu(catalog, {"lora": methods["lora"]}, scores, GainPolicy(), budget=budget)
    allocation = Knapsack().allocate(menu, budget)

    @dataclasses.dataclass(frozen=True)
    class Greedy:
        inner: object
        family: str = "matrix"

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def build(self, site, option, host, generator):
            adapter = self.inner.build(site, option, host, generator)
            adapter.register_parameter("extra", torch.nn.Parameter(torch.zeros(1)))
            return adapter

    with (
        pytest.raises(BudgetMismatch, match="lora"),
        Native().insert(model, catalog, allocation, {"lora": Greedy(methods["lora"])}),
    ):
        pass
