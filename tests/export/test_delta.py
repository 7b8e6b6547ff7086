import dataclasses
import json
import re
import struct

import pytest
import torch
from safetensors.torch import load_file

from autopeft.backends.native import Native
from autopeft.errors import UsageError
from autopeft.export._model import states_of
from autopeft.export._timm_folder import rebuild
from autopeft.export.delta import DeltaExport
from autopeft.testing._export_ground import small_vit


def written(ground, plan, folder):
    with ground.borrowed(plan) as inserted:
        DeltaExport().export(inserted, ground.record, folder)
        return load_file(folder / "delta.safetensors"), states_of(inserted)


def applied(ground, states, folder):
    """What the function in the README makes of the base with an untrained classifier."""
    code = next(b for b in re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S) if "def " in b)
    space = {}
    exec(code, space)
    blank = {name: torch.zeros_like(t) if name in states.classifier else t for name, t in states.base.items()}
    model = rebuild(ground.model, blank, ground.record)
    space["apply_delta"](model, folder / "delta.safetensors")
    return model.state_dict()


def test_only_changed_tensors_are_stored_each_in_its_smallest_form(ground, mixed_plan, tmp_path):
    delta, _ = written(ground, mixed_plan, tmp_path)
    assert sorted(delta) == sorted(
        [
            "blocks.0.attn.qkv.weight.A",
            "blocks.0.attn.qkv.weight.B",
            "blocks.0.attn.proj.weight.idx",
            "blocks.0.attn.proj.weight.val",
            "blocks.0.norm1.weight.delta",
            "blocks.0.norm1.bias.delta",
            "blocks.1.mlp.fc1.bias.delta",
            "blocks.1.mlp.fc2.weight.delta",
            "blocks.1.mlp.fc2.bias.delta",
            "head.weight.full",
            "head.bias.full",
        ]
    )
    assert delta["blocks.0.attn.proj.weight.idx"].tolist() == [0, 3, 6, 9, 12]
    assert delta["blocks.0.attn.proj.weight.idx"].dtype == torch.int32


def test_the_readmes_function_gives_the_merged_model(ground, mixed_plan, low_rank_plan, tmp_path):
    for name, plan in (("mixed", mixed_plan), ("low", low_rank_plan)):
        _, states = written(ground, plan, tmp_path / name)
        found = applied(ground, states, tmp_path / name)
        assert found.keys() == states.merged.keys()
        for key, tensor in found.items():
            torch.testing.assert_close(tensor, states.merged[key], atol=1e-6, rtol=1e-5)


def test_low_rank_under_another_change_of_the_same_tensor_is_dense(ground, tmp_path):
    plan = (ground.option("blocks.1.mlp.fc2", "lora", 1), ground.option("blocks.1.mlp.fc2", "ssf"))
    delta, states = written(ground, plan, tmp_path)
    assert "blocks.1.mlp.fc2.weight.delta" in delta
    assert "blocks.1.mlp.fc2.weight.A" not in delta
    found = applied(ground, states, tmp_path)
    torch.testing.assert_close(found["blocks.1.mlp.fc2.weight"], states.merged["blocks.1.mlp.fc2.weight"])


def test_the_header_tells_the_base(ground, low_rank_plan, tmp_path):
    written(ground, low_rank_plan, tmp_path)
    raw = (tmp_path / "delta.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])["__metadata__"]
    assert (header["format"], header["version"]) == ("autopeft-delta", "1")
    assert header["base_sha256"] == "0" * 64


def test_trained_statistics_are_stored_whole(tmp_path):
    convolutions = dataclasses.replace(small_vit("test_resnet", 32), backend=Native(train_batch_norm=True))
    norm = next(s for s in convolutions.catalog if s.kind == "batch_norm")
    with convolutions.borrowed((convolutions.option(norm.name, "norm"),)) as inserted:
        inserted.model.get_submodule(norm.module).running_mean.add_(1.0)
        DeltaExport().export(inserted, convolutions.record, tmp_path)
        states = states_of(inserted)
    delta = load_file(tmp_path / "delta.safetensors")
    name = f"{norm.module}.running_mean"
    torch.testing.assert_close(delta[f"{name}.full"], states.merged[name])


def test_adapters_that_are_no_change_of_tensors_are_refused(ground):
    with ground.borrowed((ground.option("blocks.0.mlp.fc1", "adapter", 1),)) as inserted:
        assert "blocks.0.mlp.fc1/adapter" in DeltaExport().supports(inserted)
    with pytest.raises(UsageError, match="auto, always, never"):
        DeltaExport(base="sometimes")
