"""The command line: one thin module per command; nothing heavy is imported before a command runs."""

from __future__ import annotations

import typer

from autopeft import __version__
from autopeft.cli.dashboard import dashboard
from autopeft.cli.doctor import doctor
from autopeft.cli.eval import evaluate
from autopeft.cli.export import export
from autopeft.cli.guard import guarded
from autopeft.cli.inspect import inspect
from autopeft.cli.plan import plan
from autopeft.cli.report import report
from autopeft.cli.resume import resume
from autopeft.cli.search import search
from autopeft.cli.study import study_app
from autopeft.cli.train import train
from autopeft.cli.worker import worker

__all__ = ["app", "main"]

app = typer.Typer(
    name="autopeft",
    help="Where trainable parameters should go, and of which kind, under an exact budget.\n\n"
    "Start here:  autopeft search --budget 0.1%   (bundled model and data, offline, on a CPU, under three minutes)\n\n"
    "Your data:   autopeft search --model vit_base_patch16_224 --data FOLDER --budget 0.1%",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command("search")(guarded(search))
app.command("plan")(guarded(plan))
app.command("train")(guarded(train))
app.command("eval")(guarded(evaluate))
app.command("export")(guarded(export))
app.command("report")(guarded(report))
app.command("dashboard")(guarded(dashboard))
app.command("inspect")(guarded(inspect))
app.command("resume")(guarded(resume))
app.command("worker")(guarded(worker))
app.command("doctor")(guarded(doctor))
app.add_typer(study_app, name="study")


def _version(value: bool) -> None:
    if value:
        print(f"autopeft {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="print the version"),
) -> None:
    pass


def main() -> None:
    """Entry point of the `autopeft` command."""
    app()
