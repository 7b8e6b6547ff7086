"""A finished run for people: record, report, leaderboard, dashboard."""

from __future__ import annotations

import csv
import io
import json
from typing import TYPE_CHECKING

from autopeft.core.codec import encode
from autopeft.core.record import Record
from autopeft.pipeline.packing import packing_of
from autopeft.pipeline.planfile import read_plan
from autopeft.report import dashboard
from autopeft.report.html import render_html
from autopeft.report.markdown import render_markdown
from autopeft.report.rows import allocation_rows
from autopeft.store.atomic import read_json, write_json, write_text
from autopeft.store.paths import RunFolder

if TYPE_CHECKING:
    from autopeft.pipeline.prepare import Prepared
    from autopeft.search.optuna_study import OptunaSearcher

__all__ = ["publish"]


def publish(record: Record, run: RunFolder, searcher: OptunaSearcher, prepared: Prepared) -> None:
    """Write `record.json`, `report.md`, `report.html`, `leaderboard.csv` and `best.json`, and the dashboard's pages.

    A dashboard that cannot be written to never fails a run.
    """
    catalog = prepared.catalog
    predicted = {
        t.number: sum(o["gain"] for o in read_json(run.root / t.plan)["options"])
        for t in record.trials
        if t.role in ("default", "trial", "full", "repacked")
    }
    sensitivity: dict[str, float] = {}
    for place, total in prepared.scores.totals.items():
        sensitivity[place.site] = sensitivity.get(place.site, 0.0) + total
    best = next(t for t in record.trials if t.number == record.best)
    plan = read_plan(run.root / best.plan)
    rows = allocation_rows(plan.allocation, catalog)
    packing = packing_of(prepared, plan)
    write_json(run.record, encode(record))
    write_text(run.report_md, render_markdown(record, rows, catalog, packing))
    page = render_html(record, rows, catalog, sensitivity=sensitivity, predicted=predicted, packing=packing)
    write_text(run.report_html, page)
    write_text(run.leaderboard, _leaderboard(record))
    value = best.rewards[0] if best.rewards else None
    write_json(run.root / "best.json", {"trial": best.number, "value": value, "plan": best.plan})
    dashboard.publish(searcher.study, record, rows, predicted=predicted, folder=run)


def _leaderboard(record: Record) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["trial", "name", "role", "status", "reward", "spent", "mix", "seconds", "digest"])
    ordered = sorted(record.trials, key=lambda t: (not t.rewards, *(-r for r in t.rewards), t.number))
    for t in ordered:
        reward = f"{t.rewards[0]:.6f}" if t.rewards else ""
        mix = json.dumps(dict(t.mix), sort_keys=True)
        writer.writerow(
            [t.number, t.name, t.role, t.outcome.status, reward, t.spent, mix, f"{t.outcome.seconds:.2f}", t.digest]
        )
    return out.getvalue()
