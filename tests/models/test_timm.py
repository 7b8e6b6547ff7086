from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from autopeft.errors import UnknownModel, UsageError
from autopeft.models.load import load_model
from autopeft.models.spec import ModelSpec

ARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
SMALL = {"depth": 2, "embed_dim": 24, "num_heads": 2, "patch_size": 8}


def _donor(num_classes: int = 5) -> nn.Module:
    torch.manual_seed(5)
    return timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=num_classes, **ARGS).eval()


def _folder(path: Path, model: nn.Module, weights: bool = True) -> str:
    config = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 5,
        "model_args": ARGS,
        "pretrained_cfg": {
            "tag": "mine", "input_size": [3, 32, 32], "fixed_input_size": True, "mean": [0.1, 0.2, 0.3],
            "std": [0.4, 0.5, 0.6], "crop_pct": 1.0, "num_classes": 5, "classifier": "head",
            "first_conv": "patch_embed.proj", "label_names": ["a", "b", "c", "d", "e"],
        },
    }  # fmt: skip
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    if weights:
        save_file(model.state_dict(), path / "model.safetensors")
    return f"local-dir:{path}"


def test_folder_gives_its_own_weights_and_configuration(tmp_path: Path) -> None:
    donor = _donor()
    loaded = load_model(ModelSpec(_folder(tmp_path / "m", donor)))
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded.model(images), donor(images))
    assert loaded.architecture == "vit_tiny_patch16_224"
    assert {k: loaded.model_args[k] for k in ARGS} == ARGS
    assert (loaded.pretrained_tag, loaded.label_names) == ("mine", ("a", "b", "c", "d", "e"))
    assert loaded.data_config["mean"] == (0.1, 0.2, 0.3)
    assert loaded.data_config["input_size"] == (3, 32, 32)
    assert set(loaded.data_config) == {"input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode"}


def test_model_args_rebuild_the_model(tmp_path: Path) -> None:
    loaded = load_model(ModelSpec(_folder(tmp_path / "m", _donor()), img_size=48))
    rebuilt = timm.create_model(loaded.architecture, pretrained=False, num_classes=5, **loaded.model_args)
    rebuilt.load_state_dict(loaded.model.state_dict())
    assert loaded.data_config["input_size"] == (3, 48, 48)


def test_folders_that_are_no_models(tmp_path: Path) -> None:
    with pytest.raises(UnknownModel, match=r"holds no config\.json"):
        load_model(ModelSpec(f"local-dir:{tmp_path}"))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UnknownModel, match="cannot be read as JSON"):
        load_model(ModelSpec(f"local-dir:{tmp_path}"))
    (tmp_path / "config.json").write_text('{"architecture": "BertModel"}')
    with pytest.raises(UnknownModel, match="names no architecture of timm"):
        load_model(ModelSpec(f"local-dir:{tmp_path}"))
    with pytest.raises(UnknownModel, match=r"cannot be loaded: No suitable checkpoints"):
        load_model(ModelSpec(_folder(tmp_path / "empty", _donor(), weights=False)))


def test_image_size_is_built_in_or_left_to_the_data() -> None:
    vit = load_model(ModelSpec("vit_tiny_patch16_224", pretrained=False, img_size=32, kwargs=SMALL))
    assert vit.model.patch_embed.img_size == (32, 32)
    assert vit.model_args == {**SMALL, "img_size": 32}
    resnet = load_model(ModelSpec("resnet18", pretrained=False, img_size=32, kwargs={"layers": (1, 1, 1, 1)}))
    assert resnet.data_config["input_size"] == (3, 32, 32)
    assert "img_size" not in resnet.model_args
    assert resnet.pretrained_tag == ""


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [({"depht": 3}, "does not take these arguments: .*depht"), ({"embed_dim": 25, "num_heads": 2}, "cannot be built")],
)
def test_wrong_arguments(kwargs: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_model(ModelSpec("vit_tiny_patch16_224", pretrained=False, kwargs=kwargs))


def test_weights_of_another_class_count_and_image_size(tmp_path: Path) -> None:
    donor = _donor(num_classes=9)
    path = tmp_path / "donor.safetensors"
    save_file(donor.state_dict(), path)
    same = load_model(ModelSpec("vit_tiny_patch16_224", pretrained_path=str(path), img_size=32, kwargs=SMALL))
    assert torch.equal(same.model.blocks[1].mlp.fc2.weight, donor.blocks[1].mlp.fc2.weight)
    assert same.model.head.weight.shape[0] == 1000
    larger = load_model(ModelSpec("vit_tiny_patch16_224", pretrained_path=str(path), img_size=64, kwargs=SMALL))
    assert larger.model.pos_embed.shape == (1, 65, 24)
    assert torch.equal(larger.model.pos_embed[:, 0], donor.pos_embed[:, 0])
    assert larger.pretrained_tag == ""
