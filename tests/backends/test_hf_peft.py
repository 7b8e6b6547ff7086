"""The hf_peft backend keeps the laws, trains as the native one does, and starts PEFT's methods from the data."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from autopeft.backends._peft_ranks import RankPool
from autopeft.backends.hf_peft import HfPeftBackend, HfPeftInserted
from autopeft.backends.native import Native
from autopeft.core.allocation import Allocation
from autopeft.core.budget import Budget
from autopeft.core.contracts import Backend, Inserted, Method
from autopeft.core.menu import Indices, Option
from autopeft.core.places import places_of
from autopeft.core.site import Catalog
from autopeft.errors import UsageError
from autopeft.methods._peft_layer import ADAPTER
from autopeft.methods.bias import Bias
from autopeft.methods.dora import DoRA
from autopeft.methods.hf_peft import HfPeft
from autopeft.methods.lora import LoRA
from autopeft.methods.peft_adapter import PeftAdapter
from autopeft.methods.sparse import Sparse
from autopeft.methods.ssf import SSF
from autopeft.models.scan import scan
from autopeft.testing._model_facts import differences, facts
from autopeft.testing.backend_laws import BackendLaws
from autopeft.testing.tiny import tiny_convnet, tiny_vit
from autopeft.testing.toy_task import ToyTask
from autopeft.training.loop import Fit, fit
from autopeft.training.settings import LearningRates, TrainSettings

# torch warns once when a sparse tensor is made without saying whether to check it, as SHiRA does.
pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks")

X = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
FC1 = "blocks.0.mlp.fc1"
MATRICES = tuple(f"blocks.{i}.{name}" for i in (0, 1) for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"))


class TestHfPeft(BackendLaws):
    def make(self) -> Backend:
        return HfPeftBackend()


class TestUntranslated(BackendLaws):
    plans = ("vit", "head only")

    def make(self) -> Backend:
        return HfPeftBackend(translate=False)


def plan_of(catalog: Catalog, methods: Mapping[str, Method], *choices: tuple[str, str, int]) -> Allocation:
    options = []
    for name, key, size in choices:
        site, method = catalog[name], methods[key]
        indices = Indices(np.arange(0, 2 * size, 2, dtype=np.int64)) if isinstance(method, Sparse) else None
        places = places_of(catalog, method, site)
        options.append(Option(name, key, size, method.cost(site, size), 0.0, places, indices))
    return Allocation(tuple(options), Budget(10**9))


def gap(one: Tensor, other: Tensor) -> float:
    return float((one - other).detach().abs().max())


def disturb(inserted: Inserted) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for adapter in inserted.named_adapters().values():
            for p in adapter.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=generator).to(p))


def trained(
    backend: Backend, methods: Mapping[str, Method], choices: tuple[tuple[str, str, int], ...], steps: int = 12
) -> tuple[Fit, dict[str, Tensor]]:
    """Train a tiny transformer on the toy task, one batch an epoch, so that the curve has a loss per step."""
    model = tiny_vit()
    catalog = scan(model)
    task = ToyTask(n_inner=8, batch_size=8)
    settings = TrainSettings(epochs=steps, warmup_fraction=0.0, lr=LearningRates(head=1e-2), lr_scale=4.0)
    with backend.insert(model, catalog, plan_of(catalog, methods, *choices), methods, seed=3) as inserted:
        done = fit(inserted, task, settings, methods=methods, seed=5, device="cpu", watch=None)
        return done, inserted.state()


PARITY: dict[str, tuple[Method, tuple[tuple[str, str, int], ...]]] = {
    "lora": (LoRA(), tuple((m, "it", 2) for m in MATRICES)),
    "lora, alpha 8": (LoRA(alpha=8.0), tuple((m, "it", 2) for m in MATRICES)),
    "dora": (DoRA(), tuple((m, "it", 2) for m in MATRICES)),
    "sparse as SHiRA": (Sparse(), (("blocks.0.attn.qkv", "it", 64), (FC1, "it", 160))),
    "ssf": (SSF(), tuple((m, "it", 1) for m in (*MATRICES, "blocks.0.norm1", "norm", "patch_embed.proj"))),
}


@pytest.mark.parametrize("case", PARITY)
def test_native_and_peft_give_the_same_losses(case: str) -> None:
    method, choices = PARITY[case]
    native, native_state = trained(Native(), {"it": method}, choices)
    theirs, state = trained(HfPeftBackend(), {"it": method}, choices)
    assert len(native.losses) == 12
    assert native.losses[0] - native.losses[-1] > 4e-3, "nothing was learnt, so nothing is compared"
    assert max(abs(a - b) for a, b in zip(native.losses, theirs.losses, strict=True)) <= 1e-5
    assert state.keys() == native_state.keys(), "a checkpoint of one is one of the other"
    assert all(gap(state[n].float(), t.float()) <= 1e-4 for n, t in native_state.items())


@pytest.mark.parametrize("case", PARITY)
def test_translated_options_run_in_layers_of_peft(case: str) -> None:
    method, choices = PARITY[case]
    model = tiny_vit()
    catalog = scan(model)
    with HfPeftBackend().insert(model, catalog, plan_of(catalog, {"it": method}, *choices), {"it": method}) as inserted:
        adapters = inserted.named_adapters().values()
        layers = [adapter.around.layer for adapter in adapters]
        assert all(any("peft" in cls.__module__ for cls in type(layer).__mro__) for layer in layers)
        disturb(inserted)
        adapted = inserted.model(X)
        merged = inserted.merged_state()
    assert gap(functional_call(model, merged, (X,)), adapted) <= 1e-5
    assert gap(adapted, model(X)) > 1e-3


def test_what_peft_cannot_hold_exactly_stays_native() -> None:
    model = tiny_convnet()
    catalog = scan(model)
    methods = {"lora": LoRA(), "sparse": Sparse()}
    plan = plan_of(
        catalog, methods, ("blocks.0.conv1", "lora", 1), ("stem", "lora", 2), ("blocks.0.conv2", "sparse", 32)
    )
    with HfPeftBackend().insert(model, catalog, plan, methods) as inserted:
        forms = {key: adapter.form for key, adapter in inserted.named_adapters().items()}
    assert forms == {"blocks.0.conv1/lora": "swap", "stem/lora": "stand_in", "blocks.0.conv2/sparse": "branch"}
    vit = tiny_vit()
    catalog = scan(vit)
    plan = plan_of(catalog, methods, (FC1, "sparse", 79), ("blocks.0.attn.qkv[q]", "lora", 1))
    with HfPeftBackend().insert(vit, catalog, plan, methods) as inserted:
        assert {adapter.form for adapter in inserted.named_adapters().values()} == {"branch"}


def test_native_methods_compose_around_a_layer_of_peft() -> None:
    """A multiplicative type on the weight, SSF on the output, a full bias and LoRA elsewhere: merged is unmerged."""
    methods = {"hra": HfPeft("hra"), "boft": HfPeft("boft"), "ssf": SSF(), "bias": Bias(), "lora": LoRA()}
    model = tiny_vit()
    catalog = scan(model)
    plan = plan_of(
        catalog,
        methods,
        (FC1, "hra", 4),
        (FC1, "ssf", 1),
        (FC1, "bias", 1),
        ("blocks.1.mlp.fc1", "boft", 4),
        ("blocks.1.mlp.fc1", "ssf", 1),
        ("blocks.1.mlp.fc2", "lora", 2),
        ("blocks.1.mlp.fc2", "ssf", 1),
    )
    before = facts(model)
    with HfPeftBackend().insert(model, catalog, plan, methods) as inserted:
        forms = {key: adapter.form for key, adapter in inserted.named_adapters().items()}
        assert forms["blocks.1.mlp.fc2/lora"] == "stand_in"
        assert forms["blocks.1.mlp.fc2/ssf"] == "output", "one layer of PEFT per host: the weight's"
        disturb(inserted)
        adapted, merged = inserted.model(X), inserted.merged_state()
        with inserted.plain() as plain:
            bare = plain(X)
    assert not differences(before, facts(model))
    assert gap(bare, model(X)) == 0.0
    assert gap(functional_call(model, merged, (X,)), adapted) <= 1e-5


@pytest.mark.parametrize("backend", [HfPeftBackend(), Native()])
def test_types_of_peft_on_different_slots_of_one_host_compose(backend: Backend) -> None:
    methods = {
        "dora": HfPeft("dora"),
        "ia3": HfPeft("ia3"),
        "beft": HfPeft("beft"),
        "road": HfPeft("road"),
        "lora": LoRA(),
    }
    model = tiny_vit()
    catalog = scan(model)
    fc2 = "blocks.0.mlp.fc2"
    plan = plan_of(
        catalog,
        methods,
        (FC1, "dora", 2),
        (FC1, "ia3", 1),
        (FC1, "beft", 1),
        (fc2, "lora", 2),
        (fc2, "road", 2),
    )
    before, logits = facts(model), model(X)
    with backend.insert(model, catalog, plan, methods) as inserted:
        assert gap(inserted.model(X), logits) <= 1e-6
        disturb(inserted)
        adapted, merged = inserted.model(X), inserted.merged_state()
    assert not differences(before, facts(model))
    assert gap(functional_call(model, merged, (X,)), adapted) <= 1e-5
    assert gap(adapted, logits) > 1e-3


def test_an_exception_leaves_the_weights_of_a_changed_base_alone() -> None:
    """PiSSA and OLoRA take a part of the weight away: from the stand-in, not from the model."""
    methods = {"pissa": HfPeft("pissa"), "olora": HfPeft("olora")}
    model = tiny_vit()
    catalog = scan(model)
    before, logits = facts(model), model(X)
    plan = plan_of(catalog, methods, (FC1, "pissa", 4), ("blocks.1.mlp.fc1", "olora", 4))

    def use() -> None:
        with HfPeftBackend().insert(model, catalog, plan, methods) as inserted:
            assert gap(inserted.model(X), logits) <= 1e-5
            assert all(bool(p.any()) for a in inserted.named_adapters().values() for p in a.parameters())
            disturb(inserted)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        use()
    assert not differences(before, facts(model))


# Starts that look at the data


def on_matrices(method: HfPeft, size: int) -> tuple[nn.Module, Catalog, Allocation, dict[str, Method]]:
    model = tiny_vit()
    catalog = scan(model)
    methods: dict[str, Method] = {"it": method}
    return model, catalog, plan_of(catalog, methods, *((m, "it", size) for m in MATRICES)), methods


def test_eva_starts_from_the_principal_directions_of_the_inputs() -> None:
    """Oracle: the eigenvectors of the covariance of what enters the first projection."""
    model, catalog, plan, methods = on_matrices(HfPeft("eva", {"eva_config": {"tau": 0.999}}), 2)
    task = ToyTask(n_inner=32, batch_size=32)
    seen: list[Tensor] = []
    handle = model.get_submodule(MATRICES[0]).register_forward_hook(lambda m, a, y: seen.append(a[0].detach()))
    with torch.no_grad():
        for batch in task.batches("inner", 7):
            task.loss(model, batch)
    handle.remove()
    x = torch.cat(seen).reshape(-1, seen[0].shape[-1]).double()
    wanted = torch.linalg.eigh(torch.cov(x.T)).eigenvectors[:, -2:]
    before = facts(model)
    with HfPeftBackend().insert(model, catalog, plan, methods) as inserted:
        start, fresh = inserted.state(), inserted.model(X)
        inserted.prepare(task, 7)
        changed = {n for n, t in inserted.state().items() if not torch.equal(t, start[n])}
        assert changed == {f"adapter/{m}/it/layer.lora_A.default.weight" for m in MATRICES}
        assert gap(inserted.model(X), fresh) == 0.0, "B is zero, so the outputs stay"
        found = inserted.state()[f"adapter/{MATRICES[0]}/it/layer.lora_A.default.weight"].double()
        cosines = torch.linalg.svdvals(found @ wanted)
        assert float(cosines.min()) > 0.99, f"another subspace: cosines {cosines.tolist()}"
    assert not differences(before, facts(model))


def test_eva_refuses_ranks_beyond_the_tokens_of_a_batch() -> None:
    model, catalog, plan, methods = on_matrices(HfPeft("eva"), 8)
    with HfPeftBackend().insert(model, catalog, plan, methods) as inserted, pytest.raises(UsageError, match="settled"):
        inserted.prepare(ToyTask(n_inner=4, n_outer=4, n_test=4, batch_size=1), 0)


def test_lora_ga_starts_along_the_gradient_and_changes_no_output() -> None:
    """Oracle: B holds the leading left singular vectors of the weight's mean gradient over the batches."""
    model, catalog, plan, methods = on_matrices(HfPeft("lora_ga", {"lora_ga_config": {"direction": "A2rBr"}}), 2)
    task = ToyTask(n_inner=32, batch_size=16)
    weight = model.get_submodule(FC1).weight
    total = torch.zeros_like(weight)
    for batch in task.batches("inner", 7):
        (gradient,) = torch.autograd.grad(task.loss(model, batch), weight)
        total += gradient
    wanted = torch.linalg.svd(total).U[:, :2]
    before = facts(model)
    with HfPeftBackend().insert(model, catalog, plan, methods) as inserted:
        fresh = inserted.model(X)
        inserted.prepare(task, 7)
        assert gap(inserted.model(X), fresh) <= 1e-5
        state = inserted.state()
        up = state[f"adapter/{FC1}/it/layer.lora_B.default.weight"]
        assert float(up.abs().max()) > 0
        cosines = torch.linalg.svdvals(torch.linalg.qr(up).Q.T @ wanted)
        assert float(cosines.min()) > 0.999, f"another subspace: cosines {cosines.tolist()}"
        disturb(inserted)
        moved, adapted = inserted.state(), inserted.model(X)
        merged = inserted.merged_state()
    assert not differences(before, facts(model))
    assert gap(functional_call(model, merged, (X,)), adapted) <= 1e-5
    fresh_model = tiny_vit()
    with HfPeftBackend().insert(fresh_model, catalog, plan, methods, seed=9) as inserted:
        inserted.load_state(moved)
        assert gap(inserted.model(X), adapted) <= 1e-6, "the start is stored, so no data is needed again"


@pytest.mark.parametrize("tuner", ["eva", "lora_ga", "adalora"])
def test_a_backend_without_starts_says_so_before_the_first_step(tuner: str) -> None:
    model, catalog, plan, methods = on_matrices(HfPeft(tuner), 4)
    with Native().insert(model, catalog, plan, methods) as inserted:
        with pytest.raises(UsageError, match="set `backend: hf_peft`"):
            inserted.advance(0, 10)
        assert not inserted.advance(3, 10), "a training that goes on has had its start"


@pytest.mark.parametrize("tuner", ["pissa", "olora", "eva", "lora_ga", "adalora", "orthogonal"])
def test_each_baseline_trains(tuner: str) -> None:
    sizes = tuple((m, "it", 4) for m in MATRICES)
    done, _ = trained(HfPeftBackend(), {"it": HfPeft(tuner)}, sizes, steps=8)
    losses = list(done.losses)
    # AdaLoRA's orthogonality is no part of the reported loss.
    assert losses[-1] < 0.9 * losses[0], losses


# AdaLoRA


def test_adalora_cuts_to_its_budget_over_all_sites_and_a_checkpoint_goes_on_alike() -> None:
    model, catalog, plan, methods = on_matrices(HfPeft("adalora", {"target_r": 2}), 4)
    task = ToyTask(n_inner=8, batch_size=8)
    (batch,) = task.batches("inner", 0)
    total = 20

    def steps(inserted: Inserted, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
        for step in range(first, last):
            inserted.advance(step, total)
            optimizer.zero_grad()
            penalty = inserted.penalty()
            assert penalty is not None
            torch.autograd.backward(task.loss(inserted.model, batch) + penalty)
            optimizer.step()

    def ranks(inserted: Inserted) -> list[int]:
        adapters = [a for a in inserted.named_adapters().values() if isinstance(a, PeftAdapter)]
        return [int((a.layer.lora_E[ADAPTER] != 0).sum()) for a in adapters]

    def optimizer_of(inserted: Inserted) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for g in inserted.groups().values() for p in g], lr=0.05)

    with HfPeftBackend().insert(model, catalog, plan, methods) as inserted:
        assert ranks(inserted) == [0] * 8, "E is zero at the start"
        steps(inserted, optimizer_of(inserted), 0, 10)
        half = inserted.state()
        steps(inserted, optimizer_of(inserted), 10, total)
        inserted.advance(total, total)
        whole, left = inserted.state(), ranks(inserted)
        assert not [name for name in inserted.stored() if "mean" in name or "spread" in name or "kept" in name]
    assert sum(left) == 2 * 8, left
    assert len(set(left)) > 1, f"every site kept the same rank, {left}: the budget was not shared"
    with HfPeftBackend().insert(model, catalog, plan, methods, seed=4) as inserted:
        inserted.load_state(half)
        steps(inserted, optimizer_of(inserted), 10, total)
        inserted.advance(total, total)
        again = inserted.state()
    assert all(torch.equal(again[n], t) for n, t in whole.items())


def test_adaloras_penalty_is_the_mean_distance_from_orthogonality() -> None:
    model, catalog, plan, methods = on_matrices(HfPeft("adalora", {"orth_reg_weight": 0.25}), 3)
    with HfPeftBackend().insert(model, catalog, plan, methods) as inserted:
        terms = []
        for adapter in inserted.named_adapters().values():
            assert isinstance(adapter, PeftAdapter)
            with torch.no_grad():
                adapter.layer.lora_A[ADAPTER].copy_(2 * torch.eye(3, adapter.site.in_features))
                adapter.layer.lora_B[ADAPTER].copy_(torch.eye(adapter.site.out_features, 3))
            terms += [3 * 3**0.5, 0.0]  # ||4 I - I|| of A, ||I - I|| of B
        found = inserted.penalty()
        assert found is not None
        assert float(found.detach()) == pytest.approx(0.25 * sum(terms) / len(terms))


def test_the_average_of_the_sensitivity_is_the_papers() -> None:
    """One step by hand: mean = (1 - b1) |w g|, spread = (1 - b2) | |w g| - mean |."""
    model, catalog, plan, methods = on_matrices(HfPeft("adalora"), 4)
    with HfPeftBackend().insert(model, catalog, plan, methods) as inserted:
        adapter = next(iter(inserted.named_adapters().values()))
        assert isinstance(adapter, PeftAdapter)
        factor = adapter.layer.lora_A[ADAPTER]
        inserted.advance(0, 10)
        (factor * torch.arange(factor.numel()).view_as(factor)).sum().backward()
        now = (factor * torch.arange(factor.numel()).view_as(factor)).abs().detach()
        mean, spread = adapter.get_buffer("lora_A_mean"), adapter.get_buffer("lora_A_spread")
        assert torch.allclose(mean, 0.15 * now)
        assert torch.allclose(spread, 0.15 * 0.85 * now)
        assert isinstance(inserted, HfPeftInserted)
        assert [type(pool) for pool in inserted._pools] == [RankPool]
