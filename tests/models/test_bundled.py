from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open

import autopeft.models
from autopeft.models.load import load_model
from autopeft.models.spec import ModelSpec

WEIGHTS = Path(autopeft.models.__file__).with_name("weights")


def test_size_and_structure() -> None:
    loaded = load_model(ModelSpec())
    assert (WEIGHTS / "vit_tiny_fashion.safetensors").stat().st_size <= 3_000_000
    assert sum(p.numel() for p in loaded.model.parameters()) <= 1_300_000
    assert loaded.model.pos_embed.shape[1] <= 26
    catalog = loaded.reset_head(10, 0)
    assert (catalog.n_depth, catalog.head, catalog.n_base) == (6, ("head",), 1_211_136)
    assert loaded.data_config == {
        "input_size": (3, 28, 28), "interpolation": "bicubic", "mean": (0.286,) * 3, "std": (0.353,) * 3,
        "crop_pct": 1.0, "crop_mode": "center",
    }  # fmt: skip
    assert len(loaded.label_names) == 10
    assert loaded.pretrained_tag == "fashion_mnist"


def test_weights_are_those_of_the_file() -> None:
    loaded = load_model(ModelSpec())
    with safe_open(WEIGHTS / "vit_tiny_fashion.safetensors", "pt") as file:
        assert {file.get_tensor(k).dtype for k in file.keys()} == {torch.float16}  # noqa: SIM118  # not a dict
        for key, value in loaded.model.state_dict().items():
            assert torch.equal(value, file.get_tensor(key).float())
    assert load_model(ModelSpec(pretrained=False)).weights_hash != loaded.weights_hash


def test_recorded_accuracy_reaches_what_was_asked_for() -> None:
    config = json.loads((WEIGHTS / "vit_tiny_fashion.json").read_text())
    assert config["training"]["test_accuracy"] >= 0.84


def test_other_image_size_resizes_the_position_embedding() -> None:
    loaded = load_model(ModelSpec(img_size=35))
    assert loaded.model.pos_embed.shape == (1, 26, 128)
    assert loaded.model(torch.zeros(1, 3, 35, 35)).shape == (1, 10)
