import dataclasses
import json

import pytest
import timm
import torch
import yaml

from autopeft.errors import ExportError
from autopeft.export.timm import TimmExport
from autopeft.models.scan import scan
from autopeft.testing._export_ground import ExportGround
from autopeft.testing.tiny import tiny_vit


def test_timm_rebuilds_a_mixed_plan(ground, mixed_plan, tmp_path):
    with ground.borrowed(mixed_plan) as inserted:
        TimmExport().export(inserted, ground.record, tmp_path)
        expected = ground.logits(inserted)
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(ground.images), expected, atol=1e-5, rtol=0)
    config = timm.data.resolve_model_data_config(model)
    assert (config["input_size"], tuple(config["mean"]), config["crop_pct"]) == ((3, 28, 28), (0.5, 0.5, 0.5), 1.0)


def test_the_config_is_what_transformers_needs(ground, low_rank_plan, tmp_path):
    counted = dataclasses.replace(
        ground.record,
        model={**ground.record.model, "model_args": {**ground.record.model["model_args"], "num_classes": 4}},
    )
    with ground.borrowed(low_rank_plan) as inserted:
        TimmExport().export(inserted, counted, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "num_classes" not in config["model_args"]
    assert config["label_names"] == ["ant", "bee", "cat", "dog"]
    assert config["num_classes"] == 4
    assert "license" not in config["pretrained_cfg"]  # random weights are nobody's


def test_the_card_can_be_read_by_hubs(ground, mixed_plan, tmp_path):
    facts = {**ground.record.model, "pretrained_tag": "augreg_in21k_ft_in1k", "spec": "vit_tiny_patch16_224"}
    with ground.borrowed(mixed_plan) as inserted:
        TimmExport().export(inserted, dataclasses.replace(ground.record, model=facts), tmp_path)
    _, front, body = (tmp_path / "README.md").read_text().split("---\n", 2)
    card = yaml.safe_load(front)
    assert card["base_model"] == "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    assert card["base_model_relation"] == "finetune"
    assert card["license"] == "apache-2.0"
    for option in mixed_plan:
        assert f"| `{option.site}` | {option.method} |" in body
    assert 'timm.create_model("local-dir:FOLDER", pretrained=True)' in body


def test_a_plan_that_cannot_be_merged_is_refused(ground):
    with ground.borrowed((ground.option("blocks.0.mlp.fc1", "adapter", 2),)) as inserted:
        assert "blocks.0.mlp.fc1/adapter" in TimmExport().supports(inserted)


def test_a_model_that_timm_cannot_rebuild_is_refused(ground):
    model = tiny_vit()
    strange = ExportGround(model, scan(model, torch.zeros(1, 3, 8, 8)), ground.record, torch.zeros(1, 3, 8, 8))
    with strange.borrowed(()) as inserted:
        assert "no registered architecture of timm" in TimmExport().supports(inserted)


def test_classes_and_outputs_must_agree(ground, tmp_path):
    short = dataclasses.replace(ground.record, data={"classes": ["one", "two"]})
    with ground.borrowed(()) as inserted, pytest.raises(ExportError, match="2 classes, but the model has 4 outputs"):
        TimmExport().export(inserted, short, tmp_path)
