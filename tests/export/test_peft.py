import dataclasses
import json
import re

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

from autopeft.backends.native import Native
from autopeft.errors import ExportError, UsageError
from autopeft.export._model import states_of
from autopeft.export.peft import PeftExport, _targets
from autopeft.export.peft_init import PeftInitExport
from autopeft.testing._export_ground import small_vit


def written(ground, plan, exporter, folder, record=None):
    with ground.borrowed(plan) as inserted:
        exporter.export(inserted, record or ground.record, folder)
        logits = ground.logits(inserted)
    return json.loads((folder / "adapter_config.json").read_text()), load_file(
        folder / "adapter_model.safetensors"
    ), logits  # fmt: skip


def test_names_are_anchored_and_alpha_is_the_rank(ground, low_rank_plan, tmp_path):
    config, tensors, _ = written(ground, low_rank_plan, PeftExport(), tmp_path)
    assert config["rank_pattern"] == {
        r"^patch_embed\.proj$": 2,
        r"^blocks\.0\.attn\.qkv$": 3,
        r"^blocks\.1\.attn\.qkv$": 6,
        r"^blocks\.1\.mlp\.fc1$": 1,
    }
    assert config["alpha_pattern"] == config["rank_pattern"]
    assert config["r"] == config["lora_alpha"] == 6
    assert config["modules_to_save"] == ["head"]
    assert config["target_modules"] == [
        "patch_embed.proj",
        "blocks.0.attn.qkv",
        "blocks.1.attn.qkv",
        "blocks.1.mlp.fc1",
    ]
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert shapes["base_model.model.patch_embed.proj.lora_A.weight"] == (2, 3, 7, 7)
    assert shapes["base_model.model.patch_embed.proj.lora_B.weight"] == (32, 2, 1, 1)
    assert shapes["base_model.model.blocks.1.attn.qkv.lora_A.weight"] == (6, 32)
    assert shapes["base_model.model.blocks.1.attn.qkv.lora_B.weight"] == (96, 6)
    assert shapes["base_model.model.head.weight"] == (4, 32)
    assert len(shapes) == 4 * 2 + 2


def test_padding_to_one_rank_changes_nothing(ground, low_rank_plan, tmp_path):
    _, ragged, _ = written(ground, low_rank_plan, PeftExport(), tmp_path / "a")
    config, padded, _ = written(ground, low_rank_plan, PeftExport(uniform_rank=True), tmp_path / "b")
    assert (config["r"], config["rank_pattern"], config["alpha_pattern"]) == (6, {}, {})
    for name in (n for n in ragged if "lora_A" in n):
        up = name.replace("lora_A", "lora_B")
        assert padded[name].shape[0] == padded[up].shape[1] == 6
        small = ragged[up].flatten(1) @ ragged[name].flatten(1)
        torch.testing.assert_close(padded[up].flatten(1) @ padded[name].flatten(1), small)


def test_the_untrained_start_is_the_base(ground, low_rank_plan, tmp_path):
    config, tensors, _ = written(ground, low_rank_plan, PeftInitExport(), tmp_path)
    assert config["inference_mode"] is False
    assert all(not tensor.any() for name, tensor in tensors.items() if "lora_B" in name)
    rows = tensors["base_model.model.blocks.0.attn.qkv.lora_A.weight"]  # core: the rows of V^T
    torch.testing.assert_close(rows @ rows.T, torch.eye(3), atol=1e-5, rtol=0)
    assert tensors["base_model.model.head.weight"].any()
    assert "is_trainable=True" in (tmp_path / "README.md").read_text()


def test_the_base_is_beside_what_nobody_can_fetch(ground, low_rank_plan, tmp_path):
    config, _, _ = written(ground, low_rank_plan, PeftExport(), tmp_path / "bundled")
    assert config["base_model_name_or_path"] == "base"
    with ground.borrowed(low_rank_plan) as inserted:
        states = states_of(inserted)
    base = load_file(tmp_path / "bundled" / "base" / "model.safetensors")
    assert all(torch.equal(base[name], states.base[name]) for name in base if name not in states.classifier)
    assert not any(base[name].any() for name in states.classifier)

    public = {**ground.record.model, "spec": "vit_tiny_patch16_224", "pretrained_tag": "augreg_in21k_ft_in1k"}
    record = dataclasses.replace(ground.record, model=public)
    config, _, _ = written(ground, low_rank_plan, PeftExport(), tmp_path / "public", record)
    assert config["base_model_name_or_path"] == "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    assert not (tmp_path / "public" / "base").exists()
    written(ground, low_rank_plan, PeftExport(base="always"), tmp_path / "always", record)
    assert (tmp_path / "always" / "base" / "model.safetensors").is_file()
    from_file = dataclasses.replace(record, study={"model": {"pretrained_path": "weights.pth"}})
    written(ground, low_rank_plan, PeftExport(), tmp_path / "file", from_file)
    assert (tmp_path / "file" / "base").is_dir()


def test_peft_loads_it(ground, low_rank_plan, tmp_path):
    from peft import PeftModel

    _, _, expected = written(ground, low_rank_plan, PeftExport(), tmp_path)
    base = timm.create_model(f"local-dir:{tmp_path / 'base'}", pretrained=True)
    model = PeftModel.from_pretrained(base, str(tmp_path)).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(ground.images), expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(model.merge_and_unload()(ground.images), expected, atol=1e-5, rtol=0)
    assert model.peft_config["default"].rank_pattern[r"^blocks\.0\.attn\.qkv$"] == 3


@pytest.mark.parametrize(
    ("site", "key", "size"),
    [
        ("blocks.0.mlp.fc1", "sparse", 4),
        ("blocks.0.mlp.fc1", "bias", 1),
        ("blocks.0.norm1", "norm", 1),
        ("blocks.0.mlp.fc1", "ssf", 1),
        ("blocks.0.mlp.fc1", "adapter", 1),
    ],
)
def test_other_kinds_are_refused_by_name(ground, site, key, size, tmp_path):
    plan = (ground.option("blocks.1.attn.qkv", "lora", 1), ground.option(site, key, size))
    with ground.borrowed(plan) as inserted:
        reason = PeftExport().supports(inserted)
        assert f"{site}/{key}" in reason
        assert "blocks.1.attn.qkv/lora" not in reason
        with pytest.raises(ExportError, match=re.escape(f"{site}/{key}")):
            PeftExport().export(inserted, ground.record, tmp_path)


def test_a_head_alone_is_no_adapter(ground):
    with ground.borrowed(()) as inserted:
        assert "no adapters" in PeftExport().supports(inserted)


def test_trained_statistics_and_ambiguous_heads_are_refused():
    convolutions = small_vit("test_resnet", 32)
    site = next(s.name for s in convolutions.catalog if s.kind == "conv2d" and s.groups == 1 and s.depth > 0)
    plan = (convolutions.option(site, "lora", 1),)
    with convolutions.borrowed(plan) as inserted:
        assert PeftExport().supports(inserted) == ""
        convolutions.model.add_module("other_fc", nn.Identity())
        try:
            assert "'other_fc' shares" in PeftExport().supports(inserted)
        finally:
            del convolutions.model.other_fc
    moving = dataclasses.replace(convolutions, backend=Native(train_batch_norm=True))
    with moving.borrowed(plan) as inserted:
        assert "BatchNorm" in PeftExport().supports(inserted)


def test_targets_become_a_pattern_where_a_list_would_hit_more():
    class Towers(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(2, 2)
            self.text = nn.ModuleDict({"fc": nn.Linear(2, 2)})

    assert _targets(["text.fc"], Towers()) == ["text.fc"]
    pattern = _targets(["fc"], Towers())
    assert isinstance(pattern, str)
    assert [name for name in ("fc", "text.fc", "xfc") if re.fullmatch(pattern, name)] == ["fc"]


def test_an_unknown_choice_is_refused():
    with pytest.raises(UsageError, match="auto, always, never"):
        PeftExport(base="sometimes")
