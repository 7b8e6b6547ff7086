"""Scoring by two processes that share the batches, against one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).with_name("ranks_process.py")
CASES = ("per_sample", "per_batch", "single", "single_per_sample", "fisher", "amp")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What each rank, and a lone process, found by case; a rank that waits for ever fails the test."""
    folder = tmp_path_factory.mktemp("ranks")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder)], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: torch.load(folder / f"{name}.pt") for name in ("0", "1", "alone")}


@pytest.mark.parametrize("case", CASES)
def test_ranks_agree_bit_for_bit_and_with_one_process(found: dict[str, dict[str, Any]], case: str) -> None:
    """Also where one rank has fewer batches than the other, or none."""
    (one, totals, n), (two, other_totals, other_n), (alone, _, n_alone) = (found[name][case] for name in found)
    assert one.keys() == two.keys() == alone.keys()
    assert n == other_n == n_alone == (4 if "single" in case else 17)
    assert totals == other_totals
    for key, tensor in alone.items():
        assert torch.equal(one[key], two[key]), key
        # Sums in float64 for a model in float64, else in float32; the terms are the same.
        tolerance = 1e-12 if tensor.dtype == torch.float64 else 1e-5
        torch.testing.assert_close(one[key], tensor, rtol=0, atol=tolerance * float(tensor.abs().max()))


def test_a_failure_of_one_rank_ends_all(found: dict[str, dict[str, Any]]) -> None:
    assert found["1"]["one fails"] == "RuntimeError: the disk is full"
    assert found["0"]["one fails"].startswith("AutopeftError: scoring failed on another rank")


def test_ranks_that_score_other_things_are_refused(found: dict[str, dict[str, Any]]) -> None:
    for rank in "01":
        assert found[rank]["other seeds"].startswith("UsageError: the ranks do not score the same thing")
