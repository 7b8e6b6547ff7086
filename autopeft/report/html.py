"""`report.html`: a run as one self-contained page that loads nothing from anywhere."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from autopeft.core.record import Record
from autopeft.core.site import Site
from autopeft.report._text import gain_text, metric_text, number, search_metric, share_text, stage_seconds
from autopeft.report.figures import figures
from autopeft.report.fronts import front_figure, front_table
from autopeft.report.loading import loading_notes
from autopeft.report.packing import packing_lines
from autopeft.report.rows import AllocationRow, allocation_rows, spending
from autopeft.report.searched import race_table, search_notes
from autopeft.report.tables import allocation_table, contender_table, cost_table, trial_table
from autopeft.report.verdict import Verdict, verdict

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

__all__ = ["render_html"]


@dataclass(frozen=True, slots=True)
class _Tile:
    label: str
    value: str
    note: str = ""
    share: float | None = None


def render_html(
    record: Record,
    plan: Iterable[Mapping[str, Any] | AllocationRow] = (),
    sites: Iterable[Site] = (),
    *,
    sensitivity: Mapping[str, float] | None = None,
    predicted: Mapping[int, float] | None = None,
    packing: Mapping[str, Any] | None = None,
) -> str:
    """The page, some 5 MB of which are plotly.js.

    Args:
        record: the run.
        plan: options of the winning plan, as `plan.json` lists them, or its rows.
        sites: the catalogue; gives the plan's rows their role and depth.
        sensitivity: site name to score.
        predicted: number of a trial to the gain its plan was predicted to have.
        packing: how well the winning plan is packed, as `plan.json` says.
    """
    from jinja2 import Environment, StrictUndefined

    known = tuple(sites)
    rows = allocation_rows(plan, known)
    shown = figures(record, rows, sensitivity=sensitivity, sites=known, predicted=predicted)
    if front_table(record).rows:
        shown["front"] = front_figure(record)
    source = files("autopeft.report").joinpath("page.html.jinja").read_text(encoding="utf-8")
    template = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True).from_string(source)
    judged = verdict(record)
    return template.render(
        title=str(record.model.get("name") or "run"),
        verdict=judged,
        tone=_tone(judged),
        tiles=_tiles(record),
        contenders=contender_table(record),
        allocation=allocation_table(rows),
        groups=_groups(rows),
        packing=packing_lines(packing or {}, record.budget.get("limit", 0)),
        trials=trial_table(record),
        front=front_table(record),
        race=race_table(record),
        notes=search_notes(record),
        costs=cost_table(record),
        exports=[
            {"kind": kind, "path": path, "code": loading_notes(kind, path)} for kind, path in record.exports.items()
        ],
        facts=_facts(record),
        figures=shown,
        plotly=_plotly_js() if shown else "",
        payload=_payload(shown),
    )


def _tone(judged: Verdict) -> str:
    if judged.gained and judged.sure:
        return "good"
    return "none" if judged.gained is False else "open"


def _tiles(record: Record) -> list[_Tile]:
    metric = search_metric(record)
    tiles = []
    if record.contenders:
        winner, *others = record.contenders
        values = [o.metrics[metric] for o in winner.outcomes if metric in o.metrics]
        if values:
            seeds = f"{len(values)} seeds" if len(values) > 1 else "1 seed"
            note = f"{winner.name}, {winner.outcomes[0].split} split, {seeds}"
            tiles.append(_Tile(metric, metric_text(metric, sum(values) / len(values)), note))
        outside = [c for c in others if c.role == "baseline"]
        if outside:
            closest = min(outside, key=lambda c: c.gain)
            low, high = (gain_text(metric, v) for v in closest.interval)
            note = f"[{low}, {high}] over {closest.name}"
            tiles.append(_Tile("gain over the best baseline", gain_text(metric, closest.gain), note))
    spent = record.contenders[0].spent if record.contenders else None
    if spent is None:
        spent = next((t.spent for t in record.trials if t.number == record.best), None)
    limit = record.budget.get("limit")
    if spent is not None and limit:
        unit = str(record.budget.get("unit", "trainable"))
        noun = {"trainable": "parameters", "entries": "changed entries", "stored": "stored numbers"}.get(unit, unit)
        note = f"of {number(limit)} {noun}, {share_text(spent, limit)}"
        tiles.append(_Tile("budget spent", number(spent), note, min(1.0, spent / limit)))
    if record.trials:
        done = sum(t.outcome.status == "done" for t in record.trials)
        seconds = record.seconds.get("total") or sum(record.seconds.values())
        note = f"{done} done" + (f", {stage_seconds(seconds)} in all" if seconds else "")
        tiles.append(_Tile("trials", number(len(record.trials)), note))
    return tiles


def _groups(rows: tuple[AllocationRow, ...]) -> list[dict[str, Any]]:
    groups = []
    for title, totals in (
        ("By method", spending(rows, lambda r: r.method)),
        ("By role", spending(rows, lambda r: r.role)),
    ):
        whole, top = sum(totals.values()), max(totals.values(), default=0)
        bars = [
            {"name": key, "value": number(n), "share": share_text(n, whole), "length": n / top if top else 0.0}
            for key, n in totals.items()
        ]
        groups.append({"title": title, "bars": bars})
    return groups


def _facts(record: Record) -> list[tuple[str, str]]:
    model, data, budget = record.model, record.data, record.budget
    facts = [("run folder", record.run)]
    facts += [("model " + key, str(model[key])) for key in ("name", "architecture", "pretrained_tag") if model.get(key)]
    facts += [("model " + key, number(model[key])) for key in ("n_base", "n_head") if model.get(key)]
    facts += [("catalogue fingerprint", str(model["fingerprint"]))] if model.get("fingerprint") else []
    if data:
        sizes = ", ".join(f"{name} {number(n)}" for name, n in (data.get("sizes") or {}).items())
        facts.append(("data", f"{data.get('spec', '')} ({sizes}; {len(data.get('classes', ()))} classes)"))
    if budget:
        facts.append(
            ("budget", f"{number(budget.get('limit', 0))} {budget.get('unit', '')} {budget.get('text') or ''}")
        )
    facts += [(str(key), _plain(value)) for key, value in record.environment.items()]
    return [(key, value) for key, value in facts if value]


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _payload(shown: Mapping[str, Figure]) -> str:
    """JSON that is safe inside a script element: a name from the data cannot end it."""
    text = json.dumps({name: json.loads(figure.to_json()) for name, figure in shown.items()}, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026").replace("\u2028", "\\u2028")


def _plotly_js() -> str:
    from plotly.offline import get_plotlyjs

    script: str = get_plotlyjs()
    return script
