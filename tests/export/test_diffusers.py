"""Exports of denoisers: a pipeline, a LoRA file and a PEFT folder, each loaded in a fresh process."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from autopeft.core.contracts import Exporter, Inserted
from autopeft.core.menu import Option
from autopeft.core.record import Record
from autopeft.errors import ExportError
from autopeft.export.diffusers import DiffusersExport
from autopeft.export.diffusers_lora import DiffusersLoRAExport
from autopeft.export.peft import PeftExport
from autopeft.models.calling import output_on
from autopeft.models.scan import scan
from autopeft.testing._export_ground import ExportGround, small_vit
from autopeft.testing.exporter_laws import ExporterLaws
from autopeft.testing.tiny_denoiser import tiny_denoiser, tiny_pipeline


class Ground(ExportGround):
    def logits(self, inserted: Inserted) -> Tensor:
        with torch.no_grad():
            return output_on(inserted.model, self.images)


def ground_of(kind: str, labels: int | None = None, folder: str = "") -> ExportGround:
    model = tiny_denoiser(kind, labels)
    catalog = scan(model)
    images = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    scheduler = {"_class_name": "DDPMScheduler", "num_train_timesteps": 100}
    facts: Mapping[str, Any] = {
        "name": "diffusers:tiny",
        "spec": "diffusers:tiny",
        "architecture": type(model).__name__,
        "model_args": {},
        "data_config": {"input_size": (1, 8, 8), "diffusion": {"folder": folder, "scheduler": scheduler}},
    }
    data = {"spec": "toy", "classes": list("abcd"), "sizes": {"inner": 8}}
    budget = {"limit": 10**9, "unit": "trainable", "text": "", "share_of": None}
    return Ground(model, catalog, Record("run", {}, facts, data, budget, (), -1), images)


PLACES = {
    "unet": ("down_blocks.1.attentions.0.to_q", "up_blocks.0.resnets.0.conv1", "mid_block.attentions.0.to_v"),
    "conditional": (
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k",
        "mid_block.resnets.0.conv1",
        "up_blocks.1.attentions.0.transformer_blocks.0.ff.net.2",
    ),
    "dit": (
        "transformer_blocks.0.attn1.to_q",
        "transformer_blocks.1.ff.net.2",
        "transformer_blocks.1.attn1.to_out.0",
    ),
}


def plan_of(ground: ExportGround, kind: str) -> tuple[Option, ...]:
    first, second, third = PLACES[kind]
    return ground.option(first, "lora", 2), ground.option(second, "lora", 1), ground.option(third, "core", 3)


class DenoiserLaws(ExporterLaws):
    denoiser: ClassVar[str] = "unet"
    labels: ClassVar[int | None] = None

    def ground(self) -> ExportGround:
        return ground_of(self.denoiser, self.labels)

    def plan(self, ground: ExportGround) -> tuple[Option, ...]:
        return plan_of(ground, self.denoiser)

    def refused_plan(self, ground: ExportGround) -> tuple[Option, ...]:
        norm = next(s.name for s in ground.catalog if s.kind == "layer_norm")
        return (*self.plan(ground), ground.option(norm, "norm"))


class TestPipeline(DenoiserLaws):
    kind = "diffusers"
    labels = 5

    def make(self) -> Exporter:
        return DiffusersExport()

    # Another process that imports all of diffusers; the LoRA file's law is enough for every day.
    @pytest.mark.slow
    def test_reloaded_gives_the_same_logits(self, tmp_path: Path) -> None:
        super().test_reloaded_gives_the_same_logits(tmp_path)

    def refused_plan(self, ground: ExportGround) -> tuple[Option, ...]:
        return (*self.plan(ground), ground.option("conv_in", "adapter", 1))


class TestLoRAFile(DenoiserLaws):
    kind = "diffusers-lora"
    denoiser = "conditional"

    def make(self) -> Exporter:
        return DiffusersLoRAExport()


class TestPeftFolder(DenoiserLaws):
    kind = "peft"
    labels = 5

    def make(self) -> Exporter:
        return PeftExport()

    # Another process that imports all of diffusers; the LoRA file's law is enough for every day.
    @pytest.mark.slow
    def test_reloaded_gives_the_same_logits(self, tmp_path: Path) -> None:
        super().test_reloaded_gives_the_same_logits(tmp_path)


@contextmanager
def exported(exporter: Exporter, ground: ExportGround, kind: str, folder: Path) -> Iterator[Inserted]:
    with ground.borrowed(plan_of(ground, kind)) as inserted:
        exporter.export(inserted, ground.record, folder)
        yield inserted


def reloaded(folder: Path, images: Tensor) -> Tensor:
    """What the exported model gives, in this process; the laws load one kind of denoiser in a fresh one."""
    import diffusers

    (path,) = folder.glob("*/diffusion_pytorch_model.safetensors")
    kind = json.loads((path.parent / "config.json").read_text())["_class_name"]
    with torch.no_grad():
        return output_on(getattr(diffusers, kind).from_pretrained(path.parent).eval(), images)


@pytest.mark.parametrize("kind", ["dit", "conditional"])
def test_other_denoisers_come_back_merged(kind: str, tmp_path: Path) -> None:
    ground = ground_of(kind, 5 if kind == "dit" else None)
    with exported(DiffusersExport(), ground, kind, tmp_path) as inserted:
        expected = ground.logits(inserted)
    torch.testing.assert_close(reloaded(tmp_path, ground.images), expected, atol=1e-4, rtol=1e-4)
    assert (tmp_path / ("unet" if kind == "conditional" else "transformer") / "config.json").is_file()


def test_ranks_and_alphas_are_in_the_header(tmp_path: Path) -> None:
    with exported(DiffusersLoRAExport(), ground_of("conditional"), "conditional", tmp_path):
        pass
    with safe_open(tmp_path / "pytorch_lora_weights.safetensors", "pt") as file:
        header = json.loads(file.metadata()["lora_adapter_metadata"])
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - not a mapping
    ranks = {f"^{re.escape(name)}$": rank for name, rank in zip(PLACES["conditional"], (2, 1, 3), strict=True)}
    assert header["unet.rank_pattern"] == header["unet.alpha_pattern"] == ranks
    assert header["unet.r"] == header["unet.lora_alpha"] == 3
    assert shapes["unet.mid_block.resnets.0.conv1.lora_A.weight"] == [1, 16, 3, 3]
    assert shapes["unet.mid_block.resnets.0.conv1.lora_B.weight"] == [16, 1, 1, 1]
    assert len(shapes) == 6


def test_the_rest_of_the_pipeline_comes_along(tmp_path: Path) -> None:
    import diffusers

    source = tiny_pipeline(tmp_path / "source", "unet", None)
    (source / "model_index.json").write_text('{"_class_name": "DDPMPipeline"}')
    (source / "notes").mkdir()
    (source / "notes" / "private.txt").write_text("not a part")
    ground = ground_of("unet", None, str(source))
    with exported(DiffusersExport(), ground, "unet", tmp_path / "out"):
        pass
    written = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert written == {
        "README.md",
        "model_index.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    }
    assert "_name_or_path" not in json.loads((tmp_path / "out/unet/config.json").read_text())
    scheduler = diffusers.DDPMScheduler.from_pretrained(tmp_path / "out/scheduler")
    assert scheduler.config.beta_schedule == "squaredcos_cap_v2"


def test_a_pipeline_that_is_gone_leaves_its_schedule(tmp_path: Path) -> None:
    with exported(DiffusersExport(), ground_of("unet"), "unet", tmp_path):
        pass
    assert json.loads((tmp_path / "scheduler/scheduler_config.json").read_text())["num_train_timesteps"] == 100


def test_labels_that_were_fitted_are_in_the_settings(tmp_path: Path) -> None:
    from autopeft.models._denoiser import fit_labels

    for kind, key, value in (("unet", "num_class_embeds", 8), ("dit", "num_embeds_ada_norm", 7)):
        ground = ground_of(kind, 5)
        fit_labels(ground.model, 7)
        with exported(DiffusersExport(), ground, kind, tmp_path / kind) as inserted:
            expected = ground.logits(inserted)
        torch.testing.assert_close(reloaded(tmp_path / kind, ground.images), expected, atol=1e-4, rtol=1e-4)
        (path,) = (tmp_path / kind).glob("*/config.json")
        assert json.loads(path.read_text())[key] == value


def test_what_a_format_cannot_hold_is_said() -> None:
    unet, conditional = ground_of("unet", 5), ground_of("conditional")
    with unet.borrowed(plan_of(unet, "unet")) as inserted:
        assert "no LoRA into a UNet2DModel" in DiffusersLoRAExport().supports(inserted)
        assert "untrained start" in PeftExport(trained=False).supports(inserted)
    with conditional.borrowed(()) as inserted:
        assert DiffusersLoRAExport().supports(inserted) == "the plan has no adapters"
    vit = small_vit()
    with vit.borrowed((vit.option("blocks.1.mlp.fc1", "lora", 1),)) as inserted:
        for exporter in (DiffusersExport(), DiffusersLoRAExport()):
            assert "is no model of diffusers" in exporter.supports(inserted)
            with pytest.raises(ExportError, match="no model of diffusers"):
                exporter.export(inserted, vit.record, Path("nowhere"))
