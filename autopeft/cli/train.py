"""`autopeft train`: train one plan."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated

import typer

from autopeft.cli import options as o
from autopeft.cli.progress import Talk

__all__ = ["train"]


def train(
    plan: Annotated[
        str | None, typer.Argument(metavar="[PLAN]", help="plan.json, as `autopeft plan` or a search wrote it")
    ] = None,
    overrides: o.Overrides = None,
    plan_option: Annotated[
        Path | None, typer.Option("--plan", metavar="PLAN", help="the same, before settings as KEY.PATH=VALUE")
    ] = None,
    data: Annotated[str | None, typer.Option(help="other data than the plan's")] = None,
    epochs: o.Epochs = None,
    seed: o.Seed = None,
    device: o.Device = None,
    final: Annotated[bool, typer.Option("--final", help="train on the outer split too, for production")] = False,
    output: Annotated[Path, typer.Option("--output", "-o", help="folder for adapter, plan and outcome")] = Path(
        "trained"
    ),
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Train a plan as it says; with nothing changed it reaches the metric it was made with."""
    from autopeft.config.override import parse_assignments
    from autopeft.core.codec import encode
    from autopeft.core.outcome import Split
    from autopeft.errors import UsageError
    from autopeft.pipeline.planfile import read_plan
    from autopeft.pipeline.replay import replay

    settings = list(overrides or [])
    if plan_option is not None and plan is not None:
        settings.insert(0, plan)
    place = plan_option or (None if plan is None else Path(plan))
    if place is None:
        raise UsageError("there is no plan to train; give its plan.json, as `autopeft plan` or a search wrote it")
    changed = {
        path: value
        for path, value in {"data.spec": data, "train.epochs": epochs, "device": device}.items()
        if value is not None
    } | parse_assignments(settings)
    splits: tuple[Split, ...] = ("inner", "outer") if final else ("inner",)
    with Talk(quiet=quiet or json) as talk:
        done = replay(read_plan(place), output, overrides=changed, seed=seed, splits=splits, emit=talk)
    outcome = done.result.outcome
    if json:
        print(json_module.dumps({"schema": "autopeft.train/1", "folder": str(output), "outcome": encode(outcome)}))
        return
    on = "outer split, which was trained on too" if final else "outer split"
    for name, value in sorted(outcome.metrics.items()):
        print(f"{name:<10} {value:.4f}  ({on})")
    print(f"{outcome.trainable:,} trainable parameters, {outcome.seconds:.1f} s")
    print(f"wrote {output}; export it with: autopeft export {output} --to timm")
