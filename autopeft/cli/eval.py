"""`autopeft eval`: an exported model on data."""

from __future__ import annotations

import json as json_module
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from autopeft.cli import options as o

__all__ = ["Which", "evaluate"]


class Which(StrEnum):
    """The split to evaluate on."""

    inner = "inner"
    outer = "outer"
    test = "test"


def evaluate(
    source: Annotated[
        Path, typer.Argument(help="run folder, or one written by train, export --to timm or --to native")
    ],
    data: o.Data = None,
    split: Annotated[Which, typer.Option(help="split of the data")] = Which.test,
    batch_size: o.BatchSize = None,
    seed: o.Seed = None,
    device: o.Device = None,
    json: o.Json = False,
) -> None:
    """Evaluate a trained model: accuracy with its interval, macro F1, calibration error, likelihood."""
    from autopeft.cli.flags import study_flags
    from autopeft.pipeline.evaluation import evaluate_export

    settings = study_flags(data=data, batch_size=batch_size, seed=seed, device=device)
    found = evaluate_export(source, settings, split.value)
    if json:
        print(json_module.dumps(found))
        return
    low, high = found["interval"]
    print(f"{found['samples']:,} samples of {found['data']} ({found['split']})")
    shown = "top1" if "top1" in found["metrics"] else next(iter(found["metrics"]))
    for name, value in sorted(found["metrics"].items()):
        print(f"{name:<10} {value:.4f}" + (f"  [{low:.4f}, {high:.4f}]" if name == shown else ""))
