from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from autopeft.errors import UsageError
from autopeft.models.load import load_model
from autopeft.models.loaded import LoadedModel
from autopeft.models.spec import ModelSpec
from autopeft.testing.tiny import tiny_convnet, tiny_vit

CONFIG = {"input_size": (3, 8, 8)}


def _vit(**args: object) -> LoadedModel:
    return load_model(
        ModelSpec("vit_tiny_patch16_224", pretrained=False, img_size=32, kwargs={"depth": 1, "embed_dim": 24, **args})
    )


@pytest.mark.parametrize("build", [tiny_vit, tiny_convnet])
def test_head_is_seeded_and_nothing_else_moves(build: type[nn.Module]) -> None:
    loaded = LoadedModel(build(), CONFIG, "py:x:y", "Tiny")
    base = loaded.weights_hash
    state = torch.random.get_rng_state()
    catalog = loaded.reset_head(7, seed=3)
    name = catalog.head[0]
    first = loaded.model.get_submodule(name).weight.detach().clone()
    assert first.shape == (7, 16)
    assert catalog.n_head == 7 * 17
    assert not any(m.training for m in loaded.model.modules())
    loaded.reset_head(7, seed=4)
    other = loaded.model.get_submodule(name).weight.detach().clone()
    loaded.reset_head(7, seed=3)
    assert torch.equal(loaded.model.get_submodule(name).weight, first)
    assert not torch.equal(other, first)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert LoadedModel(loaded.model, CONFIG, "py:x:y", "Tiny").weights_hash == base


def test_hash_is_of_the_base() -> None:
    loaded = LoadedModel(tiny_convnet(), CONFIG, "py:x:y", "Tiny")
    assert len(loaded.weights_hash) == 64
    changed = tiny_convnet()
    with torch.no_grad():
        changed.fc.weight.add_(1)
    assert LoadedModel(changed, CONFIG, "", "").weights_hash == loaded.weights_hash
    with torch.no_grad():
        changed.norm.running_mean.add_(1e-3)
    assert LoadedModel(changed, CONFIG, "", "").weights_hash != loaded.weights_hash
    assert LoadedModel(tiny_convnet(seed=1), CONFIG, "", "").weights_hash != loaded.weights_hash


def test_model_without_classifier_gets_one() -> None:
    loaded = _vit(num_classes=0)
    catalog = loaded.reset_head(3, 0)
    assert catalog.head == ("head",)
    assert catalog.n_head == 3 * 25
    assert loaded.model(torch.zeros(2, 3, 32, 32)).shape == (2, 3)


def test_two_classifiers_are_both_replaced() -> None:
    model = timm.create_model("deit_tiny_distilled_patch16_224", pretrained=False, img_size=32, depth=1)
    loaded = LoadedModel(model.eval(), {"input_size": (3, 32, 32)}, "", "")
    catalog = loaded.reset_head(4, 0)
    assert catalog.n_head == 2 * 4 * 193


def test_random_weights_are_the_same_every_time() -> None:
    torch.manual_seed(11)
    first = _vit().weights_hash
    torch.manual_seed(12)
    assert _vit().weights_hash == first


def test_heads_that_cannot_be_made() -> None:
    with pytest.raises(UsageError, match="at least one class, got 0"):
        LoadedModel(tiny_vit(), CONFIG, "", "").reset_head(0, 0)
    with pytest.raises(UsageError, match="the classifier of Sequential was not found"):
        LoadedModel(nn.Sequential(nn.Conv2d(3, 4, 1)), CONFIG, "", "").reset_head(2, 0)
