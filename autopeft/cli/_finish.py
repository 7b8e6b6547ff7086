"""How a finished run is printed, for `search` and `resume`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from autopeft.core.record import Record

__all__ = ["NOT_BETTER", "show_record"]

NOT_BETTER = 7
"""Exit code of a run whose chosen plan is not above every outside baseline."""


def show_record(record: Record, run: Path, *, as_json: bool) -> None:
    """Print the table or the JSON object of a run; exit with 7 when the plan is not above every outside baseline."""
    from autopeft.pipeline.summary import record_to_json
    from autopeft.report.tables import contender_table
    from autopeft.report.verdict import verdict

    judged = verdict(record)
    if as_json:
        print(json.dumps(record_to_json(record, run)))
    else:
        print(judged.headline)
        print()
        print(contender_table(record).text())
        print()
        for kind, path in record.exports.items():
            print(f"{kind:<10} {run / path}")
        print(f"{'report':<10} {run / 'report.html'}")
        print(f"{'watch':<10} autopeft dashboard {run}")
    if not judged.gained:
        raise typer.Exit(NOT_BETTER)
