"""One process that scores alone, and two that score together.

    python ranks_process.py FOLDER

Rank r writes what it found, or the error, by the name of the case into FOLDER/r.pt; the lone process into
FOLDER/alone.pt.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing, nn

from autopeft.core.scores import Scores
from autopeft.errors import AutopeftError
from autopeft.models.scan import scan
from autopeft.scoring.fisher import Fisher
from autopeft.scoring.gradient import Gradient
from autopeft.testing.tiny import tiny_vit
from autopeft.testing.toy_task import ToyTask

RANKS = 2
PER_SAMPLE = Gradient(mode="per_sample", batch_size=4, halves=True, squares=True, chunk=3)
CASES: dict[str, Callable[[], Any]] = {
    # Five batches, the last of one sample: one rank has three of them, the other two.
    "per_sample": lambda: PER_SAMPLE,
    "per_batch": lambda: Gradient(batch_size=4, halves=True),
    "single": lambda: Gradient(batch_size=4, max_batches=1),
    "single_per_sample": lambda: Gradient(mode="per_sample", batch_size=4, max_batches=1),
    "fisher": lambda: Fisher(PER_SAMPLE, power=1.0),
    "amp": lambda: Gradient(mode="per_sample", batch_size=4, amp="bf16"),
}


class DoubleTask(ToyTask):
    """Seventeen images in float64; fails at one of its batches if asked to."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__(n_inner=17)
        self._fails = fails

    def losses(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        if self._fails:
            raise RuntimeError("the disk is full")
        return super().losses(model, (batch[0].to(next(model.parameters()).dtype), batch[1]))


def score(name: str) -> tuple[dict[str, Tensor], dict[str, float], int]:
    """What is known in a case, the totals and the number of samples."""
    model = tiny_vit() if name == "amp" else tiny_vit().double()
    found: Scores = CASES[name]().score(model, scan(model), DoubleTask(), 3)
    return tensors(found), {str(place): total for place, total in found.totals.items()}, found.origin.n_samples


def tensors(scores: Scores) -> dict[str, Tensor]:
    """All that is known, by site, slot and field."""
    return {
        f"{site} {slot} {field}": tensor
        for site, evidence in scores.evidence.items()
        for slot, known in evidence.slots.items()
        for field in ("signal", "score", "half_a", "half_c", "square")
        if (tensor := getattr(known, field)) is not None
    }


def failure(task: ToyTask, seed: int) -> str:
    model = tiny_vit().double()
    try:
        Gradient(batch_size=4).score(model, scan(model), task, seed)
    except (RuntimeError, AutopeftError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def run(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    found: dict[str, Any] = {name: score(name) for name in CASES}
    found["one fails"] = failure(DoubleTask(fails=rank == 1), 3)
    found["other seeds"] = failure(DoubleTask(), rank)
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.save({name: score(name) for name in CASES}, Path(sys.argv[1]) / "alone.pt")
    multiprocessing.spawn(run, (sys.argv[1],), RANKS)
