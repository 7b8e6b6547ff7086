"""`report.md`: a run as a page of text, fit for a pull request."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from autopeft.core.record import Record
from autopeft.core.site import Site
from autopeft.report._text import metric_text, number, search_metric, share_text
from autopeft.report.fronts import front_table
from autopeft.report.loading import loading_notes
from autopeft.report.packing import packing_lines
from autopeft.report.rows import AllocationRow, allocation_rows
from autopeft.report.searched import race_table, search_notes
from autopeft.report.tables import (
    Table,
    allocation_table,
    contender_table,
    cost_table,
    environment_table,
    spending_tables,
    standing_table,
    trial_table,
)
from autopeft.report.verdict import verdict

__all__ = ["render_markdown"]


def render_markdown(
    record: Record,
    plan: Iterable[Mapping[str, Any] | AllocationRow] = (),
    sites: Iterable[Site] = (),
    packing: Mapping[str, Any] | None = None,
) -> str:
    """The whole report; its first line is the verdict, also when that is "no gain".

    Args:
        record: the run.
        plan: options of the winning plan, as `plan.json` lists them, or its rows.
        sites: the catalogue; gives the plan's rows their role and depth.
        packing: how well the winning plan is packed, as `plan.json` says.
    """
    rows = allocation_rows(plan, sites)
    parts = [f"**{verdict(record).headline}**", _facts(record, rows)]
    if record.contenders:
        parts += ["## Gain over the baselines", contender_table(record).markdown(), _how_compared(record)]
    if record.standings:
        parts += ["## Contenders", _standings(), standing_table(record).markdown()]
    parts += ["## Where the budget went", *_allocation(record, rows, packing or {})]
    if (front := front_table(record)).rows:
        parts += [
            "## Front",
            front.markdown(),
            "None of our plans beats these in every goal; the star marks the one taken.",
        ]
    if (raced := race_table(record)).rows:
        parts += ["## Race", raced.markdown()]
    if record.trials:
        parts += ["## Search history", _history(record), *search_notes(record), trial_table(record).markdown()]
    if record.costs or record.seconds:
        parts += ["## Costs", cost_table(record).markdown()]
    if record.exports:
        parts += ["## Exports", *_exports(record)]
    if record.environment:
        parts += ["## Environment", environment_table(record).markdown()]
    return "\n\n".join(part for part in parts if part) + "\n"


def _facts(record: Record, rows: tuple[AllocationRow, ...]) -> str:
    model, data, budget = record.model, record.data, record.budget
    lines = []
    if model:
        base, head = model.get("n_base"), model.get("n_head")
        size = f": {number(base)} parameters without the classifier" if base else ""
        lines.append(f"- model: `{model.get('name', '?')}`{size}" + (f", {number(head)} in it" if head else ""))
    if data:
        sizes = data.get("sizes") or {}
        splits = ", ".join(f"{name} {number(n)}" for name, n in sizes.items())
        lines.append(f"- data: `{data.get('spec', '?')}`, {len(data.get('classes', ()))} classes ({splits})")
    if budget:
        lines.append(f"- budget: {_budget(record)}")
    if rows:
        lines.append(f"- plan: {len(rows)} adapters, {number(sum(r.cost for r in rows))} trainable parameters")
    if record.run:
        lines.append(f"- run folder: `{record.run}`")
    return "\n".join(lines)


def _budget(record: Record) -> str:
    limit, unit = record.budget.get("limit", 0), record.budget.get("unit", "trainable")
    text, share_of = record.budget.get("text"), record.budget.get("share_of")
    written = f" (`{text}`" + (f" of {number(share_of)}" if share_of else "") + ")" if text else ""
    spent = _spent(record)
    used = f"; spent {number(spent)}, {share_text(spent, limit)} of it" if spent is not None else ""
    return f"{number(limit)} {unit}{written}{used}; the classifier is trained beside it and not counted"


def _spent(record: Record) -> int | None:
    if record.contenders:
        return record.contenders[0].spent
    return next((t.spent for t in record.trials if t.number == record.best), None)


def _how_compared(record: Record) -> str:
    outcomes = record.contenders[0].outcomes
    if not outcomes:
        return ""
    return (
        f"Measured on the {outcomes[0].split} split. Every plan was retrained with the same seeds; a gain is the mean "
        "of the paired differences over the seeds, positive when the winner is better."
    )


def _standings() -> str:
    return (
        "Every contender was tuned alike: each variant at the same number of learning rates in short runs on the "
        "outer split, then the best in full, at its rate and (of several) the next larger one. Own searches are in "
        "units of one full training."
    )


def _allocation(record: Record, rows: tuple[AllocationRow, ...], packing: Mapping[str, Any]) -> list[str]:
    if not rows:
        return ["The plan buys nothing: only the classifier is trained."]
    lines = packing_lines(packing, record.budget.get("limit", 0))
    parts = ["\n".join(f"- {line}" for line in lines)] if lines else []
    for table in spending_tables(rows):
        parts += [f"### {table.title}", _bars(table)]
    return [*parts, "### Site by site", allocation_table(rows).markdown()]


def _bars(table: Table) -> str:
    return f"```text\n{table.text()}\n```"


def _history(record: Record) -> str:
    metric = search_metric(record)
    counts: dict[str, int] = {}
    for trial in record.trials:
        counts[trial.outcome.status] = counts.get(trial.outcome.status, 0) + 1
    states = ", ".join(f"{n} {status}" for status, n in counts.items())
    best = next((t for t in record.trials if t.number == record.best), None)
    text = f"{len(record.trials)} trials: {states}."
    if best is not None and metric in best.outcome.metrics:
        value = metric_text(metric, best.outcome.metrics[metric])
        text += f" Taken on the {best.outcome.split} split: trial {best.number}, {best.name}, {metric} {value} (*)"
        decided = record.search.get("chosen_by", metric)
        text += "." if decided == metric else f", by the least {decided} (`search.choose`)."
    return text


def _exports(record: Record) -> list[str]:
    parts = []
    for kind, path in record.exports.items():
        note = loading_notes(kind, path)
        parts.append(f"- **{kind}**: `{path}`" + (f"\n\n```python\n{note}\n```" if note else ""))
    return parts
