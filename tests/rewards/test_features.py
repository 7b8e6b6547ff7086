from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from autopeft.errors import UsageError
from autopeft.models.load import load_model
from autopeft.models.spec import ModelSpec
from autopeft.rewards._features import BUNDLED, features


def images(n: int = 3, channels: int = 3, size: int = 28) -> torch.Tensor:
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_the_bundled_model_gives_what_its_classifier_is_given() -> None:
    loaded = load_model(ModelSpec(f"bundled:{BUNDLED}"))
    model, config = loaded.model, loaded.data_config
    mean, std = (torch.tensor(config[k])[:, None, None] for k in ("mean", "std"))
    x = images()
    with torch.no_grad():
        expected = model.forward_head(model.forward_features(((x + 1) / 2 - mean) / std), pre_logits=True)
    torch.testing.assert_close(features(x), expected)


def test_sizes_and_channels_are_fitted() -> None:
    grey = images(2, 1)
    torch.testing.assert_close(features(grey), features(grey.expand(-1, 3, -1, -1)))
    assert features(images(2, 3, 40)).shape == (2, 128)
    # A constant image is the same at every size.
    flat = torch.full((1, 3, 14, 20), 0.25)
    torch.testing.assert_close(features(flat), features(torch.full((1, 3, 28, 28), 0.25)), atol=1e-4, rtol=1e-4)


def test_batches_and_random_state_do_not_matter() -> None:
    x = images(200, 1, 14)
    state = torch.get_rng_state()
    whole = features(x)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(whole[150:], features(x[150:]), atol=1e-5, rtol=1e-5)


def test_any_timm_model_with_a_file_of_weights(tmp_path: Path) -> None:
    model = timm.create_model("test_vit", pretrained=False).eval()
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    found = features(images(2, 3, 160), "test_vit", str(tmp_path / "weights.safetensors"))
    config = timm.data.resolve_model_data_config(model)
    mean, std = (torch.tensor(config[k])[:, None, None] for k in ("mean", "std"))
    x = (images(2, 3, 160) + 1) / 2
    with torch.no_grad():
        expected = model.forward_head(model.forward_features((x - mean) / std), pre_logits=True)
    assert list(config["input_size"]) == [3, 160, 160]
    torch.testing.assert_close(found, expected)


def test_faults_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no timm model is called 'vit_enormous'"):
        features(images(), "vit_enormous")
    with pytest.raises(UsageError, match=r"are a \.safetensors file"):
        features(images(), "test_vit", str(tmp_path / "none.safetensors"))
    (tmp_path / "notes.json").write_text(json.dumps({}))
    with pytest.raises(UsageError, match=r"are a \.safetensors file"):
        features(images(), "test_vit", str(tmp_path / "notes.json"))
    save_file({"head.weight": torch.zeros(2, 2)}, tmp_path / "head.safetensors")
    with pytest.raises(UsageError, match="lacks"):
        features(images(), "test_vit", str(tmp_path / "head.safetensors"))
    for wrong in (torch.zeros(2, 4, 8, 8), torch.zeros(3, 8, 8), torch.zeros(0, 3, 8, 8)):
        with pytest.raises(UsageError, match="1 or 3"):
            features(wrong)
