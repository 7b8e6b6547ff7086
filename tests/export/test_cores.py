"""Cores of every basis and shape leave exactly: as a LoRA of their rank, merged, and natively."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.func import functional_call

from autopeft.backends._inserted import NativeInserted
from autopeft.backends.native import Native
from autopeft.core.allocation import Allocation
from autopeft.core.budget import Budget
from autopeft.core.menu import Option
from autopeft.core.places import places_of
from autopeft.core.scores import Evidence, TensorEvidence
from autopeft.core.site import Catalog, Site
from autopeft.export.native_file import load_native, write_native
from autopeft.export.peft import PeftExport
from autopeft.methods.core import Core
from autopeft.models.scan import scan
from autopeft.testing._export_ground import ExportGround, small_vit

METHODS = {
    "rectangle": Core(shape="rectangle"),
    "gradient": Core("gradient"),
    "blocks": Core("trajectory", "blocks", block=2),
    "diagonal": Core("random", "diagonal"),
    "activation": Core("activation"),
    "aligned": Core("aligned", "diagonal"),
}
PLAN = {
    "patch_embed.proj": ("rectangle", 6),
    "blocks.0.attn.qkv": ("gradient", 3),
    "blocks.0.attn.proj": ("activation", 2),
    "blocks.0.mlp.fc1": ("blocks", 3),
    "blocks.0.mlp.fc2": ("diagonal", 5),
    "blocks.1.mlp.fc1": ("rectangle", 8),
    "blocks.1.mlp.fc2": ("aligned", 4),
}


def evidence(site: Site, value: Tensor) -> Evidence:
    generator = torch.Generator().manual_seed(len(site.name))
    signal = torch.randn(value.shape, generator=generator)
    rank = min(site.out_features, site.in_features)
    draws = [torch.randn(n, rank, generator=generator) for n in (site.out_features, site.in_features)]
    pair = tuple(torch.linalg.qr(draw)[0] for draw in draws)
    bases = dict.fromkeys(("activation", "aligned", "trajectory"), pair)
    return Evidence(site, {"weight": TensorEvidence(value, signal, signal.square(), bases=bases)})


def plan_of(model: nn.Module, catalog: Catalog) -> Allocation:
    options = []
    for name, (key, size) in PLAN.items():
        site, method = catalog[name], METHODS[key]
        known = evidence(site, model.get_parameter(f"{name}.weight").detach().float())
        indices = method.select(site, known, size)
        bases = method.bases(site, known, size, indices)
        places = places_of(catalog, method, site)
        options.append(Option(name, key, size, method.cost(site, size), 1.0, places, indices, bases))
    return Allocation(tuple(options), Budget(10**9))


def borrowed(model: nn.Module) -> AbstractContextManager[NativeInserted]:
    catalog = scan(model)
    return Native().insert(model, catalog, plan_of(model, catalog), METHODS)


def trained(inserted: NativeInserted) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for part in inserted.named_adapters().values():
            for p in part.parameters():
                p.copy_(0.5 * torch.randn(p.shape, generator=generator))


def test_as_a_peft_folder(ground: ExportGround, tmp_path: Path) -> None:
    model = small_vit().model
    before = model(ground.images)
    with borrowed(model) as inserted:
        trained(inserted)
        expected = inserted.model(ground.images)
        assert PeftExport().supports(inserted) == ""
        PeftExport().export(inserted, ground.record, tmp_path)
        ranks = {key: part.low_rank()[0].shape[0] for key, part in inserted.named_adapters().items()}
    assert ranks["blocks.0.attn.qkv/gradient"] == 3
    assert ranks["blocks.0.mlp.fc1/blocks"] == 6
    assert ranks["patch_embed.proj/rectangle"] <= 2
    assert ranks["blocks.1.mlp.fc1/rectangle"] <= 2
    found = PeftModel.from_pretrained(small_vit().model, tmp_path).eval()(ground.images)
    assert (expected - before).abs().max() > 1e-2
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_merged_and_natively(ground: ExportGround, tmp_path: Path, dtype: torch.dtype) -> None:
    x = ground.images.to(dtype)
    model = small_vit().model.to(dtype)
    with borrowed(model) as inserted:
        trained(inserted)
        expected = inserted.model(x).detach()
        merged = inserted.merged_state()
        path = write_native(inserted, tmp_path / "adapter.safetensors")
    close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(functional_call(small_vit().model.to(dtype), merged, (x,)), expected, **close)
    with borrowed(small_vit().model.to(dtype)) as inserted:
        load_native(inserted, path)
        torch.testing.assert_close(inserted.model(x), expected, rtol=0, atol=0)
