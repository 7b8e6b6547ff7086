"""Budgets of storage from the plan to the exported file, and the file back into a model."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from autopeft.cli.main import app
from autopeft.pipeline.planfile import read_plan

MENU = """
methods:
  lora: {}
  bit1: {type: bit_lora, bits: 1}
  bit4: {type: bit_lora, bits: 4}
  bit_adaptformer: {}
mergeable: false
"""
WIDE = ["--model", "vit_tiny_patch16_224", "--no-pretrained", "--img-size", "8", "-b", "16"]
for pair in ("patch_size=4", "embed_dim=64", "depth=2", "num_heads=2"):
    WIDE += ["--model-kwargs", pair]
HEAD = 4 * 3 * (64 + 1)
"""Bytes of the classifier of three classes."""


def run(*args):
    result = CliRunner().invoke(app, [str(a) for a in args], catch_exceptions=False)
    assert "Traceback" not in result.stderr
    return result


@pytest.fixture(scope="module")
def menu(tmp_path_factory):
    path = tmp_path_factory.mktemp("menu") / "study.yaml"
    path.write_text(MENU)
    return path


@pytest.fixture(scope="module")
def planned(menu, pictures, tmp_path_factory):
    """Plans of one menu under several budgets, made once each."""
    folder, found = tmp_path_factory.mktemp("plans"), {}

    def make(budget, *more):
        path = folder / f"{budget}{''.join(more)}.json"
        if budget not in found:
            done = run("plan", *WIDE, "--data", pictures, "-c", menu, "--budget", budget, "-o", path, *more)
            assert done.exit_code == 0, done.stderr
            found[budget] = path
        return found[budget]

    return make


@pytest.fixture(scope="module")
def exported(planned, tmp_path_factory):
    """A plan of 3,000 bytes, trained and exported."""
    folder = tmp_path_factory.mktemp("trained")
    done = run("train", planned("3KB"), "--epochs", "2", "-o", folder)
    assert done.exit_code == 0, done.stderr
    done = run("export", folder, "--to", "native")
    assert done.exit_code == 0, done.stderr
    return folder


def test_bytes_buy_few_bits_and_parameters_buy_floats(planned):
    by_bytes, by_count = (read_plan(planned(text)).allocation for text in ("3KB", "1500"))
    assert by_bytes.budget.unit == "bytes"
    assert 0.9 * 3000 <= by_bytes.spent <= 3000
    coded = [o for o in by_bytes if o.method != "lora"]
    assert sum(o.gain for o in coded) > 0.9 * by_bytes.gain
    # A factor takes as many parameters at 1 bit as at 32, and gains less.
    assert {o.method for o in by_count if o.method != "bit_adaptformer"} == {"lora"}
    assert by_bytes.trainable > by_count.trainable


def test_numbers_stored_are_a_budget_too(planned):
    allocation = read_plan(planned("1200stored")).allocation
    assert allocation.budget.unit == "stored"
    assert 0.9 * 1200 <= allocation.spent == allocation.cost.stored <= 1200
    assert allocation.trainable > 1200


def test_the_exported_file_keeps_the_budget(exported):
    plan = read_plan(exported / "exports" / "native" / "plan.json").allocation
    file = exported / "exports" / "native" / "adapter.safetensors"
    # What a file with the classifier alone takes: header, its texts, two tensors.
    around = 400
    assert plan.spent * 0.8 <= file.stat().st_size - HEAD <= 3000 + around
    payload = sum(t.numel() * t.element_size() for name, t in load_file(file).items() if name.startswith("o"))
    assert payload == plan.cost.bits // 8
    latent = (exported / "adapter.safetensors").stat().st_size
    assert latent > 3 * file.stat().st_size, "the trial keeps the floats that training goes on from"


def test_an_exported_plan_is_evaluated_alike(exported, pictures):
    trained = json.loads((exported / "outcome.json").read_text())["metrics"]
    for source in (exported, exported / "exports" / "native"):
        done = run("eval", source, "--split", "outer", "--json")
        assert done.exit_code == 0, done.stderr
        found = json.loads(done.stdout)
        assert found["data"] == str(pictures)
        assert found["metrics"] == pytest.approx({name: trained[name] for name in found["metrics"]}, abs=1e-5)


def test_an_exported_plan_is_exported_again(exported, tmp_path):
    before = load_file(exported / "exports" / "native" / "adapter.safetensors")
    done = run("export", exported / "exports" / "native", "--to", "native", "-o", tmp_path)
    assert done.exit_code == 0, done.stderr
    after = load_file(tmp_path / "native" / "adapter.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_other_classes_are_refused(exported, pictures, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(pictures, other)
    (other / "blue").rename(other / "violet")
    refused = run("eval", exported / "exports" / "native", "--data", other)
    assert refused.exit_code == 4
    assert "classes blue, green, red" in refused.stderr


def test_another_base_model_is_refused(exported, tmp_path):
    folder = tmp_path / "native"
    shutil.copytree(exported / "exports" / "native", folder)
    plan = json.loads((folder / "plan.json").read_text())
    plan["weights_hash"] = "0" * len(plan["weights_hash"])
    (folder / "plan.json").write_text(json.dumps(plan))
    refused = run("eval", folder, "--split", "outer")
    assert refused.exit_code == 6
    assert "weights of vit_tiny_patch16_224 changed" in refused.stderr


def test_a_folder_with_neither_is_refused(tmp_path):
    refused = run("eval", tmp_path)
    assert refused.exit_code == 6
    assert "neither a merged model" in refused.stderr
