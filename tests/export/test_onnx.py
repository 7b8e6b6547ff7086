import importlib.util
import json

import pytest

from autopeft.errors import MissingDependency, UsageError
from autopeft.export import onnx as module
from autopeft.export.onnx import OnnxExport


def test_a_missing_package_names_the_extra(ground, low_rank_plan, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name))
    with ground.borrowed(low_rank_plan) as inserted, pytest.raises(MissingDependency, match=r"autopeft\[onnx\]"):
        OnnxExport().export(inserted, ground.record, tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_is_beside_the_graph(ground, mixed_plan, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_NEEDED", ())
    monkeypatch.setattr(module.OnnxExport, "_trace", lambda self, model, example, path: path.write_bytes(b"graph"))
    with ground.borrowed(mixed_plan) as inserted:
        paths = OnnxExport().export(inserted, ground.record, tmp_path)
    assert sorted(path.name for path in paths) == ["labels.txt", "model.onnx", "preprocess.json"]
    assert (tmp_path / "labels.txt").read_text() == "ant\nbee\ncat\ndog\n"
    assert json.loads((tmp_path / "preprocess.json").read_text())["input_size"] == [3, 28, 28]


def test_plans_that_cannot_be_merged_are_refused(ground):
    with ground.borrowed((ground.option("blocks.0.mlp.fc1", "adapter", 1),)) as inserted:
        assert "blocks.0.mlp.fc1/adapter" in OnnxExport().supports(inserted)
    with pytest.raises(UsageError, match="max_batch"):
        OnnxExport(max_batch=1)


@pytest.mark.slow
def test_the_graph_takes_any_batch(ground, mixed_plan, tmp_path):
    pytest.importorskip("onnxscript")
    from onnx.reference import ReferenceEvaluator

    with ground.borrowed(mixed_plan) as inserted:
        OnnxExport().export(inserted, ground.record, tmp_path)
        expected = ground.logits(inserted).numpy()
    session = ReferenceEvaluator(str(tmp_path / "model.onnx"))
    for n in (1, 3):
        (logits,) = session.run(None, {"image": ground.images[:n].numpy()})
        assert abs(logits - expected[:n]).max() < 1e-5
