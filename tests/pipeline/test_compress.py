"""A trained plan compressed, from the command to the file and back."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from autopeft.cli.main import app
from autopeft.compression.file import read_parts
from autopeft.config.decode import study_from_dict
from autopeft.core.codec import encode
from autopeft.core.outcome import Outcome
from autopeft.core.record import Contender, Record, Trial
from autopeft.pipeline.facts import budget_facts, data_facts, model_facts
from autopeft.pipeline.planfile import read_plan, write_plan
from autopeft.pipeline.prepare import prepare
from autopeft.store.atomic import write_json


def run(*args):
    result = CliRunner().invoke(app, [str(a) for a in args], catch_exceptions=False)
    assert "Traceback" not in result.stderr
    return result


def compressed(*args):
    result = run("compress", *args, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def trained_with(small, pictures, folder, methods, *more):
    plan = run("plan", *small, "--data", pictures, "--methods", methods, *more, "-o", folder / "plan.json")
    assert plan.exit_code == 0, plan.stderr
    done = run("train", folder / "plan.json", "--epochs", "2", "-o", folder / "out")
    assert done.exit_code == 0, done.stderr
    return folder / "out"


@pytest.fixture(scope="module")
def trained(small, pictures, tmp_path_factory):
    return trained_with(small, pictures, tmp_path_factory.mktemp("trained"), "core,ssf,sparse,bias", "--budget", "20%")


def listing(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_codes_for_the_change_with_what_they_cost(trained, tmp_path):
    found = compressed(trained, "--bits", "6", "--max-loss-increase", "inf", "-o", tmp_path / "out")
    first, last = found["steps"]
    outcome = json.loads((trained / "outcome.json").read_text())
    assert first["name"] == "trained"
    assert first["metrics"]["top1"] == outcome["metrics"]["top1"]
    assert first["loss"] == pytest.approx(outcome["metrics"]["nll"], abs=1e-5)
    assert last["bytes"] == (tmp_path / "out" / "compressed.safetensors").stat().st_size < first["bytes"]
    assert found["form"] == "change"
    assert found["difference"] <= 1e-4, "the logits of a process without autopeft"
    assert json.loads((tmp_path / "out" / "compress.json").read_text()) == {
        name: value for name, value in found.items() if name != "folder"
    }
    # What it says it measured is what the files give: base, plus the parts, through timm alone.
    code = (
        "import json, timm, torch\n"
        "from load_compressed import apply_compressed\n"
        "from safetensors.torch import load_file\n"
        "model = timm.create_model('local-dir:base', pretrained=True)\n"
        "apply_compressed(model, 'compressed.safetensors')\n"
        "print(float(sum(p.double().sum() for p in model.parameters())))"
    )
    done = subprocess.run(
        [sys.executable, "-B", "-c", code], cwd=tmp_path / "out", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert set(listing(tmp_path / "out")) == {
        "README.md", "base/config.json", "base/model.safetensors", "compress.json", "compressed.safetensors",
        "load_compressed.py",
    }  # fmt: skip
    readme = (tmp_path / "out" / "README.md").read_text()
    assert f"| 6 bits, lloyd | {last['bytes']:,} |" in readme


@pytest.mark.parametrize(
    "rescale",
    [pytest.param("dare", marks=pytest.mark.slow), pytest.param("darex-q", marks=pytest.mark.slow), "darex-q-layer"],
)
def test_dropping_is_recorded_and_comes_out_the_same_again(trained, tmp_path, rescale):
    flags = ["--drop", "0.6", "--rescale", rescale, "--bits", "5", "--seed", "3", "--samples", "16"]
    if rescale == "darex-q":
        flags += ["--choose", "output", "--choose-on", "inner"]
    found = compressed(trained, *flags, "--even-larger", "--max-loss-increase", "inf", "-o", tmp_path / "out")
    assert [step["name"] for step in found["steps"]] == ["trained", f"drop 0.6, {rescale}", "5 bits, lloyd"]
    assert found["steps"][1]["bytes"] > found["steps"][2]["bytes"]
    divisors = set(found["q"].values())
    if rescale == "dare":
        assert list(divisors) == pytest.approx([0.4])
        assert not found["tried"]
    else:
        assert all(0.4 - 1e-9 <= q <= 1 for q in divisors)
        assert len(found["tried"]) > 7
        assert found["plain"] is not None
    if rescale == "darex-q":
        assert len(divisors) == 1
        assert min(value for _, value in found["tried"]) <= found["plain"], "dare itself is among what is tried"
    if rescale == "darex-q-layer":
        assert len(divisors) > 1
        assert 0.1 <= found["eta"] <= 0.7
    before, again = listing(tmp_path), tmp_path / "out" / "compress.json"
    if rescale == "darex-q-layer":
        command = [sys.executable, "-m", "autopeft", "compress", str(again), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        repeated = json.loads(done.stdout)
    else:
        repeated = compressed(again)
    assert repeated["sha256"] == found["sha256"]
    assert {n: v for n, v in repeated.items() if n != "folder"} == {n: v for n, v in found.items() if n != "folder"}
    assert listing(tmp_path) == before


@pytest.mark.slow
def test_a_file_that_came_out_differently_is_said_so(trained, tmp_path):
    compressed(trained, "--bits", "4", "--max-loss-increase", "inf", "-o", tmp_path / "out")
    path = tmp_path / "out" / "compress.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, "sha256": "0" * 64}))
    again = run("compress", path)
    assert again.exit_code == 1
    assert "differently" in again.stderr
    path.write_text(json.dumps({**data, "adapter_sha256": "0" * 64}))
    again = run("compress", path)
    assert again.exit_code == 6
    assert "trained again" in again.stderr


def test_what_costs_too_much_is_not_written(trained, tmp_path):
    before = listing(trained)
    refused = run("compress", trained, "--bits", "1", "--max-loss-increase", "-10")
    assert refused.exit_code == 1
    assert "refused: the loss on the outer split rises" in refused.stderr
    assert "--max-loss-increase" in refused.stderr
    assert listing(trained) == before


def test_low_rank_factors_that_dropping_would_make_larger(small, pictures, tmp_path):
    out = trained_with(small, pictures, tmp_path, "lora")
    refused = run("compress", out, "--drop", "0.2")
    assert refused.exit_code == 2
    assert "low-rank factors" in refused.stderr
    assert "--even-larger" in refused.stderr


def test_adapters_that_cannot_be_merged_have_their_tensors_compressed(small, pictures, tmp_path):
    out = trained_with(small, pictures, tmp_path, "adapter", "mergeable=false", "--budget", "30%")
    refused = run("compress", out, "--drop", "0.5", "--bits", "4")
    assert refused.exit_code == 2
    assert "Leave --drop out" in refused.stderr
    found = compressed(out, "--bits", "8", "--max-loss-increase", "inf")
    folder = out / "compressed" / "8bit-lloyd-seed0"
    assert (found["form"], found["difference"]) == ("tensors", None)
    assert "/adapter" in found["reason"]
    assert found["steps"][1]["bytes"] < found["steps"][0]["bytes"] == found["adapter_bytes"]

    parts, before = read_parts(folder / "compressed.safetensors"), load_file(out / "adapter.safetensors")
    assert parts.keys() == before.keys()
    for name, tensor in before.items():
        if name.startswith("head/"):
            assert torch.equal(parts[name], tensor)
        else:
            assert (parts[name] - tensor).abs().max() <= 0.2 * tensor.abs().max()
    # The README's two lines make it a trained plan again.
    save_file(parts, folder / "adapter.safetensors")
    again = compressed(folder, "--bits", "8", "--head", "--max-loss-increase", "inf")
    assert again["steps"][0]["loss"] == pytest.approx(found["steps"][1]["loss"], abs=1e-6)


def test_the_adapters_tensors_of_a_plan_that_could_be_merged(trained, tmp_path):
    found = compressed(trained, "--bits", "4", "--of", "adapters", "--max-loss-increase", "inf", "-o", tmp_path / "out")
    assert (found["form"], found["reason"]) == ("tensors", "")
    assert found["steps"][0]["bytes"] == found["adapter_bytes"]


def test_data_that_changed_since(trained, tmp_path):
    plan = json.loads((trained / "plan.json").read_text())
    for file in trained.glob("plan.*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "adapter.safetensors").write_bytes((trained / "adapter.safetensors").read_bytes())
    (tmp_path / "plan.json").write_text(json.dumps({**plan, "data_hash": "0" * 16}))
    stale = run("compress", tmp_path, "--bits", "4")
    assert stale.exit_code == 6
    assert "data changed since" in stale.stderr


@pytest.fixture
def finished(trained, tmp_path):
    """A run folder as a search leaves it, its winner the trained plan."""
    root = tmp_path / "run"
    plan = read_plan(trained / "plan.json")
    write_plan(plan, root / "plans" / "0004.json")
    adapter = root / "finish" / "0004" / "seed0" / "adapter.safetensors"
    adapter.parent.mkdir(parents=True)
    adapter.write_bytes((trained / "adapter.safetensors").read_bytes())
    study = study_from_dict(plan.study)
    prepared = prepare(dataclasses.replace(study, head_warmup=False), root)
    prepared.task.unseal_test()
    outcome = Outcome("done", {"top1": 0.5}, trainable=plan.allocation.trainable, split="test")
    digest, spent = plan.allocation.digest, plan.allocation.spent
    trial = Trial(4, "trial 4", "trial", {}, digest, spent, {}, outcome, (0.5,), 1, "plans/0004.json")
    winner = Contender("trial 4", 4, "trial", spent, (outcome,))
    facts = model_facts(prepared), data_facts(prepared), budget_facts(prepared.budget)
    write_json(root / "record.json", encode(Record(str(root), {}, *facts, (trial,), 4, (winner,))))
    return root


def test_the_winner_of_a_run_and_its_sealed_split(finished):
    before = listing(finished)
    assert {"splits.json", "test_unsealed.json"} <= before.keys()
    result = run("compress", finished, "--bits", "6", "--max-loss-increase", "inf")
    assert result.exit_code == 0, result.stderr
    assert "trained on the outer split too" in result.stderr
    assert f"autopeft train {finished}/plans/0004.json" in result.stderr
    after = listing(finished)
    assert {name: after[name] for name in before} == before, "nothing else of the run changes"
    assert all(name.startswith("compressed/6bit-lloyd-seed0/") for name in after.keys() - before.keys())
    record = json.loads(after["compressed/6bit-lloyd-seed0/compress.json"])
    assert (record["seen"], record["source"]) == (True, "../..")
    absent = run("compress", f"{finished}#7", "--bits", "6")
    assert absent.exit_code == 6
    assert "no trial 7" in absent.stderr
