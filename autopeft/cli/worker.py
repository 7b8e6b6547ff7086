"""`autopeft worker`: join a study from another process or machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from autopeft.cli import options as o
from autopeft.cli.progress import Talk
from autopeft.errors import UsageError

__all__ = ["worker"]


def worker(
    run: Annotated[Path | None, typer.Argument(help="run folder, when it is on a shared disk")] = None,
    storage: Annotated[
        str | None, typer.Option(help="Optuna storage URL of the study", envvar="AUTOPEFT_STORAGE")
    ] = None,
    study: Annotated[str | None, typer.Option(help="name of the Optuna study; its only one when not given")] = None,
    max_trials: Annotated[int | None, typer.Option(help="stop after so many trials of this worker")] = None,
    device: o.Device = None,
    quiet: o.Quiet = False,
) -> None:
    """Run trials of an existing study until its total is reached.

    Model weights and data must be reachable under the same names as for the search that started the study.
    """
    from autopeft.pipeline.worker import run_worker
    from autopeft.store.paths import RunFolder

    if run is None and storage is None:
        raise UsageError("a worker needs a run folder or --storage URL")
    with Talk(quiet=quiet) as talk:
        done = run_worker(
            RunFolder(run) if run is not None else None,
            storage=storage,
            study_name=study,
            max_trials=max_trials,
            device=device,
            emit=talk,
        )
    print(f"{done} trials done by this worker")
