import re

import pytest
import torch
from safetensors.torch import load_file

from autopeft.errors import ExportError
from autopeft.export._model import states_of
from autopeft.export.compressed import change_of, write_compressed, write_parts

LOADER = ("load_compressed.py", "def apply_compressed(model, path): ...\n")


def test_a_change_is_what_the_delta_export_holds(ground, mixed_plan):
    with ground.borrowed(mixed_plan) as inserted:
        change, states = change_of(inserted), states_of(inserted)
    assert set(change.classifier) == {"head.weight", "head.bias"}
    name = "blocks.1.mlp.fc1.bias"
    torch.testing.assert_close(change.base[name] + change.parts[f"{name}.delta"], states.merged[name])
    low = change.parts["blocks.0.attn.qkv.weight.B"] @ change.parts["blocks.0.attn.qkv.weight.A"]
    torch.testing.assert_close(
        change.base["blocks.0.attn.qkv.weight"] + low, states.merged["blocks.0.attn.qkv.weight"], atol=1e-6, rtol=1e-5
    )
    adapter = ground.option("blocks.0.mlp.fc1", "adapter", 1)
    with ground.borrowed((adapter,)) as inserted, pytest.raises(ExportError, match=r"blocks\.0\.mlp\.fc1/adapter"):
        change_of(inserted)


def test_the_folder_holds_what_applying_takes(ground, low_rank_plan, tmp_path):
    with ground.borrowed(low_rank_plan) as inserted:
        change = change_of(inserted)
        alone = write_compressed(
            inserted, ground.record, tmp_path, {"w.full": torch.ones(2)}, {"format": "f"},
            change=change, loader=LOADER, sections=[("What it costs", "nothing")],
        )  # fmt: skip
    assert alone
    files = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert files == {
        "README.md", "base/config.json", "base/model.safetensors", "compressed.safetensors", LOADER[0],
    }  # fmt: skip
    base = load_file(tmp_path / "base" / "model.safetensors")
    assert not base["head.weight"].any(), "the trained classifier belongs to the change"
    torch.testing.assert_close(base["blocks.0.attn.qkv.weight"], change.base["blocks.0.attn.qkv.weight"])
    readme = (tmp_path / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", readme, re.S)[1]
    assert 'create_model("local-dir:base", pretrained=True)' in code
    assert 'apply_compressed(model, "compressed.safetensors")' in code
    assert "## What it costs\n\nnothing" in readme
    compile(code, "README.md", "exec")


def test_adapters_tensors_need_autopeft_and_the_readme_says_so(ground, tmp_path):
    with ground.borrowed((ground.option("blocks.0.mlp.fc1", "adapter", 1),)) as inserted:
        alone = write_compressed(
            inserted, ground.record, tmp_path, {"w": torch.ones(2)}, {}, change=None, loader=LOADER, sections=[]
        )
    assert not alone
    assert not (tmp_path / "base").exists()
    assert "only autopeft runs it" in (tmp_path / "README.md").read_text()


def test_the_size_is_the_files(tmp_path):
    size = write_parts(tmp_path / "x", {"a": torch.zeros(100)}, {"plan": "p"})
    assert size == (tmp_path / "x").stat().st_size > 400
