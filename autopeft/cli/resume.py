"""`autopeft resume`: continue a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from autopeft.cli import options as o
from autopeft.cli.progress import Talk

__all__ = ["resume"]


def resume(
    run: Annotated[Path, typer.Argument(help="run folder")],
    storage: Annotated[
        str | None, typer.Option(help="Optuna storage URL, when its password is not kept", envvar="AUTOPEFT_STORAGE")
    ] = None,
    trials: Annotated[int | None, typer.Option(help="trials in all; as before when not given")] = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Continue a search where it stopped, with the settings it was started with."""
    from autopeft.cli._finish import show_record
    from autopeft.config.decode import load_study
    from autopeft.errors import StoreError
    from autopeft.pipeline.search import run_search
    from autopeft.store.paths import RunFolder

    folder = RunFolder(run)
    if not folder.study.is_file():
        raise StoreError(f"there is no run in {run}: {folder.study.name} is missing. Start one with autopeft search")
    flags = {} if trials is None else {"search.trials": trials}
    with Talk(quiet=quiet or json) as talk:
        record = run_search(load_study([folder.study], flags), folder, emit=talk, storage=storage)
    show_record(record, run, as_json=json)
