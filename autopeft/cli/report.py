"""`autopeft report`: what a run has shown."""

from __future__ import annotations

import json as json_module
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from autopeft.errors import StoreError

__all__ = ["Form", "report"]


class Form(StrEnum):
    """How the report is printed."""

    text = "text"
    md = "md"
    json = "json"
    html = "html"


def report(
    run: Annotated[Path, typer.Argument(help="run folder")],
    form: Annotated[Form, typer.Option("--format", help="text and json go to stdout, html names the file")] = Form.text,
    json: Annotated[bool, typer.Option("--json", help="the same as --format json")] = False,
) -> None:
    """Print the verdict, the baselines and where the budget went."""
    from autopeft.core.codec import decode
    from autopeft.core.record import Record
    from autopeft.store.atomic import read_json
    from autopeft.store.paths import RunFolder

    folder = RunFolder(run)
    if not folder.record.is_file():
        raise StoreError(
            f"there is no finished run in {run}: {folder.record.name} is missing. Run autopeft resume {run}"
        )
    if json or form is Form.json:
        print(json_module.dumps(read_json(folder.record)))
        return
    if form is Form.html:
        print(folder.report_html)
        return
    if form is Form.md:
        print(folder.report_md.read_text())
        return
    from autopeft.report.rows import allocation_rows
    from autopeft.report.tables import allocation_table, contender_table, trial_table
    from autopeft.report.verdict import verdict

    record = decode(Record, read_json(folder.record), str(folder.record))
    print(verdict(record).headline)
    print()
    print(contender_table(record).text())
    print()
    print(trial_table(record).text())
    best = next((t for t in record.trials if t.number == record.best), None)
    if best is not None and best.plan:
        print()
        print(allocation_table(allocation_rows(read_json(run / best.plan)["options"])).text())
