"""`autopeft export`: a trained plan into another format."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated

import typer

from autopeft.cli import options as o
from autopeft.cli.progress import Talk
from autopeft.errors import UsageError

__all__ = ["export"]


def export(
    source: Annotated[str, typer.Argument(help="run folder, RUN#TRIAL, or a folder written by autopeft train")],
    to: Annotated[
        str,
        typer.Option(
            help="formats, comma-separated: timm, peft, peft-init, delta, onnx, native, diffusers, diffusers-lora"
        ),
    ] = "timm",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="folder to write to")] = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Write the trained plan in other formats; each is reloaded in a fresh process and compared."""
    from autopeft.pipeline.deliver import export_folder

    path, _, number = source.partition("#")
    if number and not number.isdigit():
        raise UsageError(f"a trial is named RUN#NUMBER, got {source!r}")
    kinds = [kind.strip() for kind in to.split(",") if kind.strip()]
    if not kinds:
        raise UsageError("--to names no format; write it as --to timm,peft")
    with Talk(quiet=quiet or json) as talk:
        written = export_folder(Path(path), kinds, output, trial=int(number) if number else None, emit=talk)
    if json:
        print(
            json_module.dumps(
                {"schema": "autopeft.export/1", "exports": [{"kind": k, "path": str(p)} for k, p in written.items()]}
            )
        )
        return
    for kind, where in written.items():
        print(f"{kind:<10} {where}")
