"""The command line: one thin module per command; nothing heavy is imported before a command runs."""

from __future__ import annotations

import typer

from autopeft import __version__
from autopeft.cli.lazy import LazyGroup

__all__ = ["app", "main"]

app = typer.Typer(
    name="autopeft",
    cls=LazyGroup,
    help="Where trainable parameters should go, and of which kind, under an exact budget.\n\n"
    "Start here:  autopeft search --budget 0.1%   (bundled model and data, offline, on a CPU, about three minutes)\n\n"
    "Your data:   autopeft search --model vit_base_patch16_224 --data FOLDER --budget 0.1%",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


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
