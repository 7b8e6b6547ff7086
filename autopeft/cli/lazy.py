"""Commands that are imported when they are run, so that help costs what an empty application costs."""

from __future__ import annotations

import difflib
import importlib
from typing import Any, ClassVar

import typer
from typer.core import TyperCommand, TyperGroup

from autopeft.cli.guard import guarded

__all__ = ["COMMANDS", "LazyGroup"]

COMMANDS: dict[str, tuple[str, str]] = {
    "search": (
        "autopeft.cli.search:search",
        "Search where the budget goes, retrain the best plan, compare it with the baselines, export it.",
    ),
    "plan": (
        "autopeft.cli.plan:plan",
        "Score the model on the data, spend the budget, write plan.json and print where it goes.",
    ),
    "train": (
        "autopeft.cli.train:train",
        "Train a plan as it says; with nothing changed it reaches the metric it was made with.",
    ),
    "eval": (
        "autopeft.cli.eval:evaluate",
        "Evaluate a trained model: accuracy with its interval, macro F1, calibration error, likelihood.",
    ),
    "export": (
        "autopeft.cli.export:export",
        "Write the trained plan in other formats; each is reloaded in a fresh process and compared.",
    ),
    "compress": (
        "autopeft.cli.compress:compress",
        "Drop entries of a trained change and keep the others in a few bits; each step's loss is measured.",
    ),
    "report": ("autopeft.cli.report:report", "Print the verdict, the baselines and where the budget went."),
    "dashboard": (
        "autopeft.cli.dashboard:dashboard",
        "Open optuna-dashboard on this machine alone, until Ctrl-C.",
    ),
    "inspect": (
        "autopeft.cli.inspect:inspect",
        "List the sites of a model, what can be put on them, and what a budget means for it.",
    ),
    "methods": (
        "autopeft.cli.methods:methods",
        "List the methods that a plan may mix: what each changes, costs and exports, and where it comes from.",
    ),
    "resume": (
        "autopeft.cli.resume:resume",
        "Continue a search where it stopped, with the settings it was started with.",
    ),
    "worker": ("autopeft.cli.worker:worker", "Run trials of an existing study until its total is reached."),
    "doctor": (
        "autopeft.cli.doctor:doctor",
        "Show versions, devices, extras and offline settings; exit with 5 when something needed is absent.",
    ),
    "study": ("autopeft.cli.study:study_app", "List and show the studies of an Optuna storage."),
}
"""Command to the function (or application) behind it and its first line of help."""


class LazyGroup(TyperGroup):
    """A group whose commands are known by name and first line until one of them is needed."""

    _loaded: ClassVar[dict[str, Any]] = {}

    _listing = False

    def list_commands(self, ctx: Any) -> list[str]:
        """The names, in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command, imported now; a stand-in with its first line while the group lists its commands."""
        if cmd_name not in COMMANDS:
            near = difflib.get_close_matches(cmd_name, COMMANDS, n=1)
            guess = f" Did you mean '{near[0]}'?" if near else ""
            ctx.fail(f"No such command '{cmd_name}'.{guess}")
        if self._listing:
            return TyperCommand(cmd_name, help=COMMANDS[cmd_name][1])
        if cmd_name not in self._loaded:
            self._loaded[cmd_name] = _load(cmd_name)
        return self._loaded[cmd_name]

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """The help of the group itself, without importing any command."""
        self._listing = True
        try:
            super().format_help(ctx, formatter)
        finally:
            self._listing = False


def _load(name: str) -> Any:
    module, _, attribute = COMMANDS[name][0].partition(":")
    found = getattr(importlib.import_module(module), attribute)
    if isinstance(found, typer.Typer):
        return typer.main.get_command(found)
    alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    alone.command(name)(guarded(found))
    return typer.main.get_command(alone)
