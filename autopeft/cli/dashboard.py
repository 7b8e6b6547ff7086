"""`autopeft dashboard`: watch a study in optuna-dashboard."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ["dashboard"]


def dashboard(
    run: Annotated[str, typer.Argument(help="run folder or Optuna storage URL")],
    host: Annotated[str, typer.Option(help="address to listen on; there is no authentication")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port; the next free one when it is taken")] = 8080,
) -> None:
    """Open optuna-dashboard on this machine alone, until Ctrl-C."""
    from autopeft.report.dashboard import serve

    serve(run, host=host, port=port, announce=print)
