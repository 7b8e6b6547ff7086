"""Denoisers of diffusers: how they are called, scanned, drawn and loaded."""

from __future__ import annotations

import builtins
import json
from functools import cache
from pathlib import Path
from typing import Any

import networkx as nx
import pytest
import torch

from autopeft.core.site import Catalog, Site
from autopeft.errors import MissingDependency, UnknownModel, UsageError
from autopeft.models._denoiser import example_call, fit_labels, is_denoiser, label_paths, takes_text
from autopeft.models.calling import output_on
from autopeft.models.diffusers import load_diffusers
from autopeft.models.graph import INPUT, OUTPUT, dataflow
from autopeft.models.load import load_model
from autopeft.models.scan import scan
from autopeft.models.spec import ModelSpec
from autopeft.testing.tiny import tiny_vit
from autopeft.testing.tiny_denoiser import tiny_denoiser, tiny_pipeline

KINDS = ("unet", "conditional", "dit", "pixart")


def example(n: int = 1) -> torch.Tensor:
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@cache
def scanned(kind: str, labels: int | None = 5) -> Catalog:
    return scan(tiny_denoiser(kind, labels), example())


def sites(catalog: Catalog) -> dict[str, Site]:
    return {site.name: site for site in catalog}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_runs_on_images_alone(kind: str) -> None:
    model = tiny_denoiser(kind)
    assert is_denoiser(model)
    assert output_on(model, example(2)).shape == (2, 2 if kind == "pixart" else 1, 8, 8)


def test_a_classifier_is_called_with_its_images() -> None:
    model = tiny_vit()
    assert not is_denoiser(model)
    images = torch.randn(2, 3, 8, 8)
    assert example_call(model, images) == ((images,), {})
    assert torch.equal(output_on(model, images), model(images))


def test_a_denoiser_that_forgets_a_condition_does_not_run() -> None:
    """The arguments of an example are needed: without labels the model refuses."""
    with pytest.raises(ValueError, match="class_labels"):
        tiny_denoiser("unet")(example(), torch.zeros(1, dtype=torch.int64))


@pytest.mark.parametrize("kind", KINDS)
def test_the_catalogue_counts_all_parameters_and_finds_attention(kind: str) -> None:
    model = tiny_denoiser(kind)
    catalog = scanned(kind)
    total = sum(p.numel() for p in model.parameters())
    assert catalog.n_base + catalog.n_head == total
    found = {site.role for site in catalog}
    assert {"attn.q", "attn.k", "attn.v", "attn.proj", "time", "stem"} <= found
    assert ("norm" in found) == (kind in ("unet", "conditional"))
    assert ("mlp.fc1" in found) == (kind != "unet")
    assert all(site.slots for site in catalog), [s.name for s in catalog if not s.slots]


def test_roles_of_a_u_net() -> None:
    found = {name: site.role for name, site in sites(scanned("conditional")).items()}
    block = "down_blocks.0.attentions.0.transformer_blocks.0"
    assert found[f"{block}.attn2.to_k"] == "attn.k"
    assert found[f"{block}.attn1.to_out.0"] == "attn.proj"
    assert found[f"{block}.ff.net.0.proj"] == "mlp.fc1"
    assert found[f"{block}.ff.net.2"] == "mlp.fc2"
    assert found["down_blocks.0.resnets.0.time_emb_proj"] == "time"
    assert found["time_embedding.linear_1"] == "time"
    assert found["down_blocks.0.downsamplers.0.conv"] == "downsample"
    assert found["up_blocks.0.upsamplers.0.conv"] == "upsample"
    assert found["up_blocks.0.resnets.0.conv_shortcut"] == "downsample"
    assert found["down_blocks.0.resnets.0.conv1"] == "conv"
    assert found["conv_in"] == "stem"
    assert found["down_blocks.0.resnets.0.norm1"] == "norm"


def test_the_head_is_the_table_of_labels() -> None:
    assert scanned("unet").head == ("class_embedding",)
    assert scanned("unet").n_head == 5 * 32
    without = scanned("unet", None)
    assert (without.head, without.n_head) == ((), 0)
    assert without.n_base == sum(p.numel() for p in tiny_denoiser("unet", labels=None).parameters())
    assert len(scanned("dit").head) == 2


def test_depth_follows_the_order_of_execution() -> None:
    """diffusers makes the middle of a U-Net last; it runs between the arms."""
    found = sites(scanned("unet"))
    blocks = sorted((s for s in found.values() if s.kind == "block"), key=lambda s: s.depth)
    assert [s.depth for s in blocks] == list(range(12))
    arms = ["".join(s.name.split(".")[0]) for s in blocks]
    assert arms == ["down_blocks"] * 3 + ["mid_block"] * 3 + ["up_blocks"] * 6
    assert blocks[1].name == "down_blocks.1.resnets.0"
    assert blocks[2].name == "down_blocks.1.attentions.0"
    assert found["time_embedding.linear_1"].depth == 0
    assert found["conv_out"].depth == 11
    assert found["mid_block.attentions.0.to_q"].depth == 4


def test_scanning_leaves_the_model_alone() -> None:
    model = tiny_denoiser("unet").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    scan(model, example())
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_the_graph_shows_skips_and_the_condition() -> None:
    model = tiny_denoiser("unet")
    catalog = scanned("unet")
    graph = dataflow(model, catalog, example())
    assert graph.graph["unused"] == []
    assert graph.has_edge(INPUT, "conv_in")
    assert graph.has_edge("conv_out", OUTPUT)
    assert graph.has_edge(INPUT, "class_embedding")
    # The stem is added to a later stage through a skip connection, not only passed down.
    assert graph.has_edge("conv_in", "up_blocks.1.resnets.1.norm1")
    assert nx.has_path(graph, "class_embedding", "mid_block.resnets.0.time_emb_proj")
    assert nx.has_path(graph, "mid_block.attentions.0", "up_blocks.0.resnets.0")


def test_labels_are_fitted_to_the_classes() -> None:
    model: Any = tiny_denoiser("unet", labels=5)
    before = model.class_embedding.weight.clone()
    fit_labels(model, 4)
    assert torch.equal(model.class_embedding.weight, before)
    fit_labels(model, 5)
    assert torch.equal(model.class_embedding.weight, before), "as many rows as classes stay as they are"
    fit_labels(model, 2)
    assert model.class_embedding.weight.shape == (3, 32)
    assert torch.equal(model.class_embedding.weight, before[-1:].expand(3, -1)), "new labels start as no class"
    dit: Any = tiny_denoiser("dit", labels=5)
    fit_labels(dit, 7)
    assert [dit.get_submodule(p).embedding_table.num_embeddings for p in label_paths(dit)] == [8, 8]
    output_on(dit.train(), example())


def test_who_looks_at_texts() -> None:
    assert [takes_text(tiny_denoiser(kind)) for kind in KINDS] == [False, True, False, True]


def test_a_folder_is_loaded(tmp_path: Path) -> None:
    folder = tiny_pipeline(tmp_path / "tiny")
    loaded = load_model(ModelSpec(f"diffusers:{folder}"))
    named = load_model(ModelSpec(f"diffusers:{folder}#unet"))
    component = load_diffusers(ModelSpec(f"diffusers:{folder / 'unet'}"), str(folder / "unet"))
    assert loaded.weights_hash == named.weights_hash == component.weights_hash
    assert loaded.architecture == "UNet2DModel"
    assert loaded.data_config["input_size"] == (1, 8, 8)
    facts = loaded.data_config["diffusion"]
    assert facts["scheduler"]["beta_schedule"] == "squaredcos_cap_v2"
    assert facts == component.data_config["diffusion"]
    assert (facts["latent"], facts["text"]) == (1, False)
    assert not loaded.model.training
    catalog = loaded.reset_head(10, seed=0)
    assert catalog.head == ("class_embedding",)
    assert load_model(ModelSpec(f"diffusers:{folder}", pretrained=False)).weights_hash != loaded.weights_hash


def test_a_file_of_weights_and_another_size(tmp_path: Path) -> None:
    folder = tiny_pipeline(tmp_path / "tiny")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    spec = f"diffusers:{folder}"
    assert (
        load_model(ModelSpec(spec, pretrained_path=str(weights))).weights_hash
        == load_model(ModelSpec(spec)).weights_hash
    )
    assert load_model(ModelSpec(spec, img_size=16)).data_config["input_size"] == (1, 16, 16)


def test_a_transformer_is_the_default_where_there_is_no_unet(tmp_path: Path) -> None:
    folder = tiny_pipeline(tmp_path / "tiny", "dit", labels=5)
    assert load_model(ModelSpec(f"diffusers:{folder}")).architecture == "DiTTransformer2DModel"


def test_what_leads_nowhere_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_pipeline(tmp_path / "tiny")
    with pytest.raises(UnknownModel, match="holds no component 'vae'; it holds unet"):
        load_model(ModelSpec(f"diffusers:{folder}#vae"))
    with pytest.raises(UnknownModel, match="names no folder"):
        load_model(ModelSpec(f"diffusers:{tmp_path / 'absent'}"))
    with pytest.raises(UsageError, match="no setting 'depth'"):
        load_model(ModelSpec(f"diffusers:{folder}", kwargs={"depth": 3}))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UnknownModel, match="hf download nobody/nothing"):
        load_model(ModelSpec("diffusers:nobody/nothing#unet"))


def test_without_diffusers_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "diffusers":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    folder = tiny_pipeline(tmp_path / "tiny")
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MissingDependency, match=r"pip install 'autopeft\[diffusion\]'") as caught:
        load_model(ModelSpec(f"diffusers:{folder}"))
    assert caught.value.exit_code == 5


def test_the_bundled_denoiser() -> None:
    loaded = load_model(ModelSpec("bundled:unet_tiny_fashion"))
    folder = Path(loaded.data_config["diffusion"]["folder"])
    assert sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) <= 5_000_000
    facts = json.loads((folder / "training.json").read_text())
    # Noise of unit variance: a model that gives nothing has a loss of 1.
    assert facts["test_denoising_loss"] < 0.12
    catalog = loaded.reset_head(10, seed=0)
    assert (catalog.n_base, catalog.n_head, catalog.head) == (699_633, 704, ("class_embedding",))
    model: Any = loaded.model
    assert model.class_embedding.num_embeddings == facts["empty_label"] + 1
    assert loaded.data_config["input_size"] == (1, 16, 16)
    with pytest.raises(UnknownModel, match="it holds unet_tiny_fashion, vit_tiny_fashion"):
        load_model(ModelSpec("bundled:absent"))
