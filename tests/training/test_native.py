"""The loop on the real backend: one plan of several families, its price counted four times, and resumed exactly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from autopeft.backends.native import Native
from autopeft.core.allocation import Allocation
from autopeft.core.budget import Budget
from autopeft.core.menu import Option
from autopeft.core.site import Catalog, Place
from autopeft.methods.bias import Bias
from autopeft.methods.core import Core
from autopeft.methods.lora import LoRA
from autopeft.methods.norm import Norm
from autopeft.models.scan import scan
from autopeft.testing.tiny import tiny_vit
from autopeft.testing.toy_task import ToyTask
from autopeft.training.checkpoint import Checkpoint, load_adapter, save_adapter, trainable_in_file
from autopeft.training.evaluate import evaluate
from autopeft.training.loop import fit
from autopeft.training.settings import TrainSettings

METHODS: dict[str, Any] = {"lora": LoRA(), "core": Core(), "bias": Bias(), "norm": Norm()}
SETTINGS = TrainSettings(epochs=4, lr_scale=2.0)


def _plan(catalog: Catalog) -> Allocation:
    """The first method in turn that fits a site that is still free."""
    options: list[Option] = []
    taken: set[Place] = set()
    for i, site in enumerate(catalog.candidates("whole")):
        for key in (list(METHODS) * 2)[i % 4 : i % 4 + 4]:
            slots = METHODS[key].slots(site)
            places = tuple(sorted(catalog.places(site, slots)))
            if slots and not taken & set(places):
                taken |= set(places)
                size = METHODS[key].sizes(site)[-1]
                options.append(Option(site.name, key, size, METHODS[key].cost(site, size), 0.0, places))
                break
    return Allocation(tuple(options), Budget(10**6))


@pytest.fixture(scope="module")
def parts() -> Iterator[tuple[nn.Module, Catalog, Allocation]]:
    model = tiny_vit()
    catalog = scan(model, torch.zeros(1, 3, 8, 8))
    return model, catalog, _plan(catalog)


def _train(parts: tuple[nn.Module, Catalog, Allocation], **changes: Any) -> tuple[Any, Mapping[str, torch.Tensor], Any]:
    model, catalog, plan = parts
    task = ToyTask()
    with Native().insert(model, catalog, plan, METHODS, seed=1) as inserted:
        result = fit(inserted, task, SETTINGS, methods=METHODS, seed=1, device="cpu", **changes)
        return result, inserted.state(), evaluate(inserted.model, task, "outer", "cpu")


def test_four_counts_agree(parts: tuple[nn.Module, Catalog, Allocation], tmp_path: Path) -> None:
    model, catalog, plan = parts
    assert {o.method for o in plan} == set(METHODS)
    with Native().insert(model, catalog, plan, METHODS, seed=1) as inserted:
        result = fit(inserted, ToyTask(), SETTINGS, methods=METHODS, seed=1, device="cpu", watch=None)
        path = save_adapter(inserted, tmp_path / "adapter.safetensors")
        assert plan.trainable == inserted.trainable_count() == result.optimised == trainable_in_file(path)
        logits = inserted.model(torch.ones(2, 3, 8, 8)).detach()
    with Native().insert(model, catalog, plan, METHODS, seed=9) as fresh:
        fresh.load_state(load_adapter(path))
        assert torch.equal(fresh.model(torch.ones(2, 3, 8, 8)), logits)


def test_trained_again_and_resumed_alike(parts: tuple[nn.Module, Catalog, Allocation], tmp_path: Path) -> None:
    model = parts[0]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    whole, expected, evaluation = _train(parts)
    assert whole.losses[-1] < whole.losses[0]
    _train(parts, max_epochs=2, checkpoint=Checkpoint(tmp_path))
    resumed, found, again = _train(parts, checkpoint=Checkpoint(tmp_path))
    assert (resumed.curve, resumed.losses) == (whole.curve, whole.losses)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert again.metrics == evaluation.metrics
    assert whole.metrics["top1"] == evaluation.top1
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_head_only(parts: tuple[nn.Module, Catalog, Allocation], tmp_path: Path) -> None:
    model, catalog, _ = parts
    with Native().insert(model, catalog, Allocation((), Budget(10)), {}, seed=1) as inserted:
        result = fit(inserted, ToyTask(), SETTINGS, methods={}, seed=1, device="cpu")
        path = save_adapter(inserted, tmp_path / "adapter.safetensors")
    assert result.optimised == trainable_in_file(path) == 0
    assert result.losses[-1] < result.losses[0]


@pytest.mark.gpu
@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_on_a_cuda_device(amp: Any, tmp_path: Path) -> None:
    model = tiny_vit().to("cuda")
    catalog = scan(model, torch.zeros(1, 3, 8, 8, device="cuda"))
    settings = TrainSettings(epochs=4, amp=amp)

    def train(**changes: Any) -> tuple[Any, Mapping[str, torch.Tensor]]:
        with Native().insert(model, catalog, _plan(catalog), METHODS, seed=1) as inserted:
            result = fit(inserted, ToyTask(), settings, methods=METHODS, seed=1, device="cuda", **changes)
            return result, inserted.state()

    whole, expected = train()
    train(max_epochs=2, checkpoint=Checkpoint(tmp_path))
    resumed, found = train(checkpoint=Checkpoint(tmp_path))
    assert whole.peak_bytes > 0
    assert resumed.epochs == 4
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)
