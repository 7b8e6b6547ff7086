"""The pictures of a report as plotly figures, each below 20 KB of JSON.

They carry no template, a transparent background and mid-grey text, so that one figure reads well on a light and on a
dark page and in optuna-dashboard, which sends every figure again on every poll.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from autopeft.core.record import Record, Trial
from autopeft.core.site import Site
from autopeft.report._plot import GREY, digits, layout, rounded, scale_axis, thin, tick
from autopeft.report._text import is_share, search_metric, search_sign
from autopeft.report.rows import AllocationRow, spending

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

__all__ = [
    "allocation_map",
    "figures",
    "gain_figure",
    "history",
    "learning_curves",
    "predicted_against_measured",
    "sensitivity_map",
    "spending_by_depth",
]

_PALETTE = (
    "#4c8dff",
    "#e8743b",
    "#19a979",
    "#b06bd9",
    "#d9a514",
    "#1fb5c9",
    "#ed4a7b",
    "#7f8fa6",
    "#8a6d3b",
    "#5b6abf",
)
_BLUE, _GREEN = "#4c8dff", "#19a979"
_SCALE = [[0.0, "rgba(76,141,255,0.07)"], [0.5, "rgba(76,141,255,0.55)"], [1.0, "rgba(38,92,214,1)"]]
_ROLES = (
    ("baseline", "baselines", "#e8743b", "diamond"),
    ("reference", "beyond the budget", GREY, "diamond-open"),
    ("default", "default plan", "#b06bd9", "circle"),
    ("trial", "trials", _BLUE, "circle"),
    ("full", "short trials' winner in full", _BLUE, "circle-open"),
    ("repacked", "repacked while training", _GREEN, "star"),
)
_MOST_NAMED = 250
_MOST_TRIALS = 600
_MOST_CELLS = 240


def figures(
    record: Record,
    rows: Sequence[AllocationRow] = (),
    *,
    sensitivity: Mapping[str, float] | None = None,
    sites: Iterable[Site] = (),
    predicted: Mapping[int, float] | None = None,
) -> dict[str, Figure]:
    """Every figure there is data for, by the name it has in the dashboard.

    Args:
        record: the run.
        rows: the winning plan.
        sensitivity: site name to score.
        sites: the catalogue, for `sensitivity`.
        predicted: number of a trial to the gain its plan was predicted to have.
    """
    found: dict[str, Figure] = {}
    if len(record.contenders) > 1:
        found["gain"] = gain_figure(record)
    if any(row.depth is not None for row in rows):
        found["allocation"] = allocation_map(rows)
        found["spending"] = spending_by_depth(rows)
    if sensitivity:
        found["sensitivity"] = sensitivity_map(sensitivity, sites)
    if record.trials:
        found["history"] = history(record)
    if any(t.outcome.curve for t in record.trials):
        found["curves"] = learning_curves(record)
    if predicted and any(t.number in predicted for t in _done(record)):
        found["prediction"] = predicted_against_measured(record, predicted)
    return found


def gain_figure(record: Record) -> Figure:
    """The winner's paired gain over every other contender, with its 95 % interval and the line of no gain."""
    from plotly.graph_objects import Figure, Scatter

    metric, others = search_metric(record), list(reversed(record.contenders[1:]))
    scale, unit = (100, "points") if is_share(metric) else (1, metric)
    low = [scale * (c.gain - c.interval[0]) for c in others]
    high = [scale * (c.interval[1] - c.gain) for c in others]
    marks = Scatter(
        x=rounded([scale * c.gain for c in others]),
        y=[c.name for c in others],
        mode="markers",
        marker={"size": 11, "color": [_GREEN if c.interval[0] > 0 else GREY for c in others]},
        error_x={"type": "data", "array": rounded(high), "arrayminus": rounded(low), "thickness": 2, "color": GREY},
        hovertemplate="%{y}: %{x:+.3g} " + unit + "<extra></extra>",
        showlegend=False,
    )
    figure = Figure([marks], layout(f"Gain of the winner ({metric})", f"gain in {unit}", ""))
    figure.update_layout(height=140 + 36 * len(others), yaxis={"automargin": True})
    figure.add_vline(x=0, line={"color": GREY, "dash": "dot"})
    return figure


def allocation_map(rows: Iterable[AllocationRow]) -> Figure:
    """Trainable parameters per block and role."""
    listed = [row for row in rows if row.depth is not None]
    cells: dict[tuple[str, int], float] = {}
    texts: dict[tuple[str, int], list[str]] = {}
    for row in listed:
        assert row.depth is not None
        key = (row.role, row.depth)
        cells[key] = cells.get(key, 0) + row.cost
        texts.setdefault(key, []).append(f"{row.method} {row.size}")
    shown = {key: ", ".join(words)[:36] for key, words in texts.items()}
    return _heat_map("Where the parameters lie", cells, shown, "parameters")


def sensitivity_map(sensitivity: Mapping[str, float], sites: Iterable[Site]) -> Figure:
    """Score per block and role, as a share of the model's whole score; slices of fused projections stand alone."""
    total = sum(sensitivity.values()) or 1.0
    cells: dict[tuple[str, int], float] = {}
    for site in sites:
        if site.name in sensitivity:
            key = (site.role, site.depth)
            cells[key] = cells.get(key, 0.0) + 100 * sensitivity[site.name] / total
    return _heat_map("Sensitivity", cells, {}, "% of the score")


def spending_by_depth(rows: Iterable[AllocationRow]) -> Figure:
    """Trainable parameters per block, stacked by method."""
    from plotly.graph_objects import Bar, Figure

    listed = [row for row in rows if row.depth is not None]
    depths = sorted({row.depth for row in listed if row.depth is not None})
    bars = []
    for index, method in enumerate(spending(listed, lambda r: r.method)):
        mine = spending([r for r in listed if r.method == method], lambda r: str(r.depth))
        color = _PALETTE[index % len(_PALETTE)]
        bars.append(Bar(x=depths, y=[mine.get(str(d), 0) for d in depths], name=method, marker={"color": color}))
    figure = Figure(bars, layout("Parameters per block", "block", "parameters", legend=True))
    figure.update_layout(barmode="stack", bargap=0.25, xaxis={"dtick": tick(len(depths))})
    return figure


def history(record: Record) -> Figure:
    """The search metric over the trials, with the best so far."""
    from plotly.graph_objects import Figure, Scatter

    metric = search_metric(record)
    trials = record.trials[-_MOST_TRIALS:]
    figure = Figure(layout=layout("Search history", "trial", metric, legend=True))
    for group, name, color, symbol in _ROLES:
        mine = [t for t in trials if t.role == group and metric in t.outcome.metrics]
        if mine:
            named = len(trials) <= _MOST_NAMED
            figure.add_trace(
                Scatter(
                    x=[t.number for t in mine],
                    y=rounded([t.outcome.metrics[metric] for t in mine]),
                    text=[t.name[:40] for t in mine] if named else None,
                    mode="markers",
                    name=name,
                    marker={"size": 9, "color": color, "symbol": symbol},
                    hovertemplate="%{x} %{text}: %{y:.4f}<extra></extra>" if named else None,
                )
            )
    best = next((t for t in record.trials if t.number == record.best), None)
    sign = search_sign(record)
    xs, ys, so_far = [], [], -math.inf
    for trial in trials:
        value = trial.outcome.metrics.get(metric)
        if value is not None and trial.role != "reference" and sign * value > so_far:
            so_far = sign * value
            xs.append(trial.number)
            ys.append(value)
    if xs and best is not None:
        xs.append(trials[-1].number)
        ys.append(ys[-1])
        line = {"color": _GREEN, "width": 2, "shape": "hv"}
        figure.add_trace(Scatter(x=xs, y=rounded(ys), mode="lines", name="best so far", line=line, hoverinfo="skip"))
    return scale_axis(figure, is_share(metric))


def learning_curves(record: Record, most: int = 8) -> Figure:
    """The search metric over the epochs, of the best trial, the baselines and the best others."""
    from plotly.graph_objects import Figure, Scatter

    metric = search_metric(record)
    sign = search_sign(record)
    with_curve = [t for t in record.trials if t.outcome.curve]

    def order(trial: Trial) -> tuple[bool, bool, float]:
        value = trial.outcome.metrics.get(metric, -math.inf * sign)
        return (trial.number != record.best, trial.role != "baseline", -sign * value)

    chosen = sorted(with_curve, key=order)[:most]
    figure = Figure(layout=layout("Learning curves", "epoch", metric, legend=True))
    for index, trial in enumerate(chosen):
        curve = thin(trial.outcome.curve)
        best = trial.number == record.best
        line = {"width": 3 if best else 1.5, "color": _PALETTE[index % len(_PALETTE)]}
        line |= {"dash": "dot"} if trial.role == "baseline" else {}
        figure.add_trace(
            Scatter(
                x=[epoch for epoch, _ in curve],
                y=rounded([value for _, value in curve]),
                mode="lines",
                name=trial.name[:40] + (" (best)" if best else ""),
                line=line,
            )
        )
    return scale_axis(figure, is_share(metric))


def predicted_against_measured(record: Record, predicted: Mapping[int, float]) -> Figure:
    """Predicted gain of every plan against what was measured: shows what the scores are worth."""
    from plotly.graph_objects import Figure, Scatter

    metric = search_metric(record)
    trials = [t for t in _done(record) if t.number in predicted and metric in t.outcome.metrics][-_MOST_NAMED:]
    marks = Scatter(
        x=rounded([predicted[t.number] for t in trials]),
        y=rounded([t.outcome.metrics[metric] for t in trials]),
        text=[t.name[:40] for t in trials],
        mode="markers",
        marker={"size": 9, "color": [_BLUE if t.role == "trial" else "#e8743b" for t in trials]},
        hovertemplate="%{text}: predicted %{x:.3g}, measured %{y:.4f}<extra></extra>",
        showlegend=False,
    )
    figure = Figure([marks], layout("Predicted against measured", "predicted gain", metric))
    return scale_axis(figure, is_share(metric))


def _heat_map(
    title: str, cells: Mapping[tuple[str, int], float], texts: Mapping[tuple[str, int], str], what: str
) -> Figure:
    from plotly.graph_objects import Figure, Heatmap

    roles = list(dict.fromkeys(role for role, _ in cells))
    depths = list(range(max((d for _, d in cells), default=0) + 1))
    small = len(roles) * len(depths) <= _MOST_CELLS
    heat = Heatmap(
        x=depths,
        y=roles,
        z=[[digits(cells[r, d]) if (r, d) in cells else None for d in depths] for r in roles],
        text=[[texts.get((r, d), "") for d in depths] for r in roles] if small and texts else None,
        colorscale=_SCALE,
        zmin=0,
        xgap=2,
        ygap=2,
        colorbar={"thickness": 10, "outlinewidth": 0, "title": {"text": what, "side": "right"}},
        hovertemplate="%{y}, block %{x}: %{z:,} "
        + what
        + ("<br>%{text}" if small and texts else "")
        + "<extra></extra>",
        hoverongaps=False,
    )
    figure = Figure([heat], layout(title, "block", ""))
    figure.update_layout(height=max(240, 130 + 26 * len(roles)))
    figure.update_xaxes(dtick=tick(len(depths)), showgrid=False)
    figure.update_yaxes(autorange="reversed", automargin=True, showgrid=False)
    return figure


def _done(record: Record) -> list[Trial]:
    return [trial for trial in record.trials if trial.outcome.status == "done"]
