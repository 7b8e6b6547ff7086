import importlib.util

import pytest
import torch

from autopeft.errors import ExportError
from autopeft.export.delta import DeltaExport
from autopeft.export.onnx import OnnxExport
from autopeft.export.peft import PeftExport
from autopeft.export.peft_init import PeftInitExport
from autopeft.export.timm import TimmExport
from autopeft.export.verify import verify, verify_all


def test_every_format_reloads_in_a_fresh_process(ground, low_rank_plan, tmp_path):
    exporters = {
        "timm": TimmExport(),
        "peft": PeftExport(),
        "peft-uniform": PeftExport(uniform_rank=True, base="never"),
        "peft-init": PeftInitExport(),
        "delta": DeltaExport(base="never"),
    }
    if importlib.util.find_spec("onnx") and importlib.util.find_spec("onnxscript"):
        exporters["onnx"] = OnnxExport()
    loaders = {"peft-uniform": _peft_on(tmp_path / "peft" / "base")}
    with ground.borrowed(low_rank_plan) as inserted:
        for kind, exporter in exporters.items():
            exporter.export(inserted, ground.record, tmp_path / kind)
        folders = {kind: tmp_path / kind for kind in exporters} | {"transformers": tmp_path / "timm"}
        found = verify_all(
            folders,
            ground.images,
            ground.logits(inserted),
            inserted=inserted,
            record=ground.record,
            tolerance=1e-5,
            loaders=loaders,
        )
    assert set(found) == set(folders)


def _peft_on(base):
    return f"""
import timm
from peft import PeftModel

logits = run_torch(PeftModel.from_pretrained(timm.create_model("local-dir:{base}", pretrained=True), folder))
"""


@pytest.fixture
def compare(ground, tmp_path):
    """Run a loader of a made-up format against expected logits, in a process that needs no torch."""

    def run(code, expected, tolerance=1e-4, timeout=60.0):
        with ground.borrowed(()) as inserted:
            return verify_all(
                {"own": tmp_path},
                ground.images,
                expected,
                inserted=inserted,
                record=ground.record,
                tolerance=tolerance,
                timeout=timeout,
                loaders={"own": code},
            )

    return run


MEANS = "logits = images.mean((2, 3))"


def test_the_largest_difference_is_measured(ground, compare):
    expected = ground.images.mean((2, 3))
    assert compare(MEANS, expected)["own"] < 1e-6
    shifted = expected.clone()
    shifted[2, 1] += 0.25
    assert compare(MEANS, shifted, tolerance=0.3)["own"] == pytest.approx(0.25, abs=1e-6)
    with pytest.raises(ExportError, match=r"logits differ by 0\.25, more than 0\.0001"):
        compare(MEANS, shifted)


def test_wrong_shapes_and_nan_are_refused(ground, compare):
    expected = ground.images.mean((2, 3))
    with pytest.raises(ExportError, match=r"shape \(4, 3\), the model \(4, 2\)"):
        compare(MEANS, expected[:, :2])
    with pytest.raises(ExportError, match="differ by nan"):
        compare(MEANS + " * float('nan')", expected)


@pytest.mark.parametrize("code", ["import autopeft", "from autopeft.export import timm", "__import__('autopeft.core')"])
def test_a_loader_that_needs_autopeft_fails(ground, compare, code):
    with pytest.raises(ExportError, match="must load without autopeft"):
        compare(code, ground.images)


def test_a_loader_sees_neither_this_folder_nor_this_path(ground, compare, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/somewhere/of/mine")
    code = f"import os, sys\nassert '/somewhere/of/mine' not in sys.path and '' not in sys.path\n{MEANS}"
    assert compare(code, ground.images.mean((2, 3)))


def test_what_goes_wrong_is_told_in_one_line(ground, compare):
    with pytest.raises(ExportError, match=r"does not load in a fresh process: ValueError: bad file$"):
        compare("raise ValueError('bad file')", ground.images)
    with pytest.raises(ExportError, match="ended with 3"):
        compare("import os; os._exit(3)", ground.images)
    with pytest.raises(ExportError, match="did not load within 1 second"):
        compare("import time; time.sleep(60)", ground.images, timeout=1.0)


def test_a_format_for_autopeft_alone_is_not_verified(ground, tmp_path):
    with ground.borrowed(()) as inserted:
        arguments = {"inserted": inserted, "record": ground.record}
        assert verify("native", tmp_path, ground.images, torch.zeros(4, 4), **arguments) is None
