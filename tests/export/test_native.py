import json

import torch

from autopeft.export.native import NativeExport
from autopeft.export.native_file import load_native


def test_any_plan_comes_back_through_the_backend(ground, mixed_plan, tmp_path):
    plan = (*mixed_plan, ground.option("blocks.0.mlp.fc1", "adapter", 2))
    with ground.borrowed(plan) as inserted:
        assert NativeExport().supports(inserted) == ""
        adapter, metadata = NativeExport().export(inserted, ground.record, tmp_path)
        expected = ground.logits(inserted)
        cost = inserted.allocation.cost
        names = set(inserted.stored())
    with ground.borrowed(plan, trained=False) as inserted:
        assert not torch.allclose(ground.logits(inserted), expected, atol=1e-3)
        load_native(inserted, adapter)
        assert torch.equal(ground.logits(inserted), expected)
    facts = json.loads(metadata.read_text())
    assert (facts["trainable"], facts["stored"], facts["bytes"]) == (cost.trainable, cost.stored, cost.of("bytes"))
    assert facts["model"]["architecture"] == "vit_tiny_patch16_224"
    assert set(facts["tensors"].values()) == names
