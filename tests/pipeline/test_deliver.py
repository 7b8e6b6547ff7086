"""A trained plan in every format, reloaded in a fresh process."""

import json

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from autopeft.cli.main import app


def run(*args):
    result = CliRunner().invoke(app, [str(a) for a in args], catch_exceptions=False)
    assert "Traceback" not in result.stderr
    return result


@pytest.fixture(scope="module")
def trained(small, pictures, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    plan = run("plan", *small, "--data", pictures, "--methods", "core,lora", "-o", folder / "plan.json")
    assert plan.exit_code == 0, plan.stderr
    done = run("train", folder / "plan.json", "--epochs", "2", "-o", folder / "out")
    assert done.exit_code == 0, done.stderr
    return folder / "out"


def test_every_format_at_once(trained):
    kinds = ["timm", "peft", "peft-init", "delta", "native"]
    result = run("export", trained, "--to", ",".join(kinds), "--json")
    assert result.exit_code == 0, result.stderr
    written = {row["kind"]: row["path"] for row in json.loads(result.stdout)["exports"]}
    assert list(written) == kinds
    again = run("export", trained, "--to", "native")
    assert again.exit_code == 0, again.stderr

    start = load_file(f"{written['peft-init']}/adapter_model.safetensors")
    end = load_file(f"{written['peft']}/adapter_model.safetensors")
    assert start.keys() == end.keys()
    ups = [name for name in start if "lora_B" in name]
    assert ups
    assert not any(start[name].any() for name in ups)
    assert any(end[name].any() for name in ups)


def test_a_plan_that_peft_cannot_hold_is_refused_by_name(small, pictures, tmp_path):
    run("plan", *small, "--data", pictures, "--methods", "bias", "-o", tmp_path / "plan.json")
    assert run("train", tmp_path / "plan.json", "--epochs", "1", "-o", tmp_path / "out").exit_code == 0
    refused = run("export", tmp_path / "out", "--to", "peft")
    assert refused.exit_code == 1
    assert "cannot be exported as peft" in refused.stderr
    assert "/bias" in refused.stderr


def test_unknown_formats_are_named(trained):
    refused = run("export", trained, "--to", "tensorflow")
    assert refused.exit_code == 2
    assert "'tensorflow'" in refused.stderr
    assert "timm" in refused.stderr
