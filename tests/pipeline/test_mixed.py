"""A plan of many methods through training, `kill -9`, resuming, export and reloading."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("mixed_process.py")


def run(*args: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, str(SCRIPT), *args], capture_output=True, text=True, check=False, env=env)


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["mergeable", "any"])
def test_a_plan_of_many_methods_survives(plan: str, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    unhurt = run("train", plan, str(whole))
    assert unhurt.returncode == 0, unhurt.stderr
    first = run("train", plan, str(killed), "2")
    assert first.returncode == -signal.SIGKILL, first.stderr
    assert (killed / "checkpoint" / "training.safetensors").exists()
    second = run("train", plan, str(killed))
    assert second.returncode == 0, second.stderr
    one, two = (torch.load(folder / "logits.pt") for folder in (whole, killed))
    assert one["losses"] == two["losses"], "the resumed training saw other losses"
    assert torch.equal(one["logits"], two["logits"]), "the resumed training ended elsewhere"
    assert one["losses"][-1] < one["losses"][0]

    fresh = run("reload", plan, str(killed))
    assert fresh.returncode == 0, fresh.stderr
    reloaded = torch.load(killed / "reloaded.pt")
    assert float((reloaded - two["logits"]).abs().max()) < 1e-5
    merged = killed / "timm.txt"
    assert merged.exists() == (plan == "mergeable")
    if merged.exists():
        assert float(merged.read_text()) < 1e-5, "the merged checkpoint, loaded where autopeft is not, differs"
