"""`autopeft study`: the studies of a storage."""

from __future__ import annotations

import json as json_module
from typing import Annotated

import typer

from autopeft.cli import options as o
from autopeft.cli.guard import guarded

__all__ = ["Storage", "study_app"]

study_app = typer.Typer(help="List and show the studies of an Optuna storage.", no_args_is_help=True)

Storage = Annotated[str, typer.Argument(help="run folder or Optuna storage URL", envvar="AUTOPEFT_STORAGE")]


def _ls(storage: Storage, json: o.Json = False) -> None:
    """List the studies of a storage."""
    from autopeft.search.listing import list_studies

    rows = list_studies(storage)
    if json:
        print(json_module.dumps({"schema": "autopeft.studies/1", "studies": rows}))
        return
    for row in rows:
        states = ", ".join(f"{count} {state}" for state, count in row["trials"].items())
        best = f"best {row['best']:.4f}" if row["best"] is not None else "nothing done yet"
        print(f"{row['name']}: {best}; {states}")


study_app.command("ls")(guarded(_ls))


@study_app.callback()
def _group() -> None:
    """List and show the studies of an Optuna storage."""
