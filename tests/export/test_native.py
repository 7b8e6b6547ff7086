import json

import torch
from safetensors.torch import load_file

from autopeft.export.native import NativeExport


def test_any_plan_comes_back_through_the_backend(ground, mixed_plan, tmp_path):
    plan = (*mixed_plan, ground.option("blocks.0.mlp.fc1", "adapter", 2))
    with ground.borrowed(plan) as inserted:
        assert NativeExport().supports(inserted) == ""
        adapter, metadata = NativeExport().export(inserted, ground.record, tmp_path)
        expected = ground.logits(inserted)
        spent = inserted.allocation.trainable
    with ground.borrowed(plan, trained=False) as inserted:
        assert not torch.allclose(ground.logits(inserted), expected, atol=1e-3)
        inserted.load_state(load_file(adapter))
        assert torch.equal(ground.logits(inserted), expected)
    facts = json.loads(metadata.read_text())
    assert facts["trainable"] == spent
    assert facts["model"]["architecture"] == "vit_tiny_patch16_224"
