"""Several goals in a report: the front as a table and as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from autopeft.core.record import Record, Trial
from autopeft.report._plot import GREY, layout, rounded
from autopeft.report._text import is_share, metric_text, number
from autopeft.report.tables import Table, mix_text

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

__all__ = ["front_figure", "front_table"]


def front_table(record: Record) -> Table:
    """The plans that none of ours beats in every goal, in the order of the first goal; a star marks the one taken.

    Empty for a search with one goal.
    """
    names = _names(record)
    on_front = set(record.search.get("front", ()))
    found = [t for t in record.trials if t.number in on_front and len(t.rewards) == len(names)]
    down = _goals(record)[0]["direction"] == "minimize" if names else False
    found.sort(key=lambda t: (t.rewards[0] if down else -t.rewards[0], t.number))
    rows = tuple(
        (
            str(t.number) + ("*" if t.number == record.best else ""),
            t.name,
            *(_value(name, value) for name, value in zip(names, t.rewards, strict=True)),
            f"{t.spent:,}",
            mix_text(t),
        )
        for t in found
    )
    header = ("#", "plan", *(f"{goal['name']} {_arrow(goal)}" for goal in _goals(record)), "spent", "methods")
    return Table("Front", header, rows if len(names) > 1 else (), "rl" + "r" * len(names) + "rl")


def front_figure(record: Record) -> Figure:
    """Every finished plan by its first two goals, with the front through those of ours that none beats."""
    from plotly.graph_objects import Figure, Scatter

    names = _names(record)
    done = [t for t in record.trials if len(t.rewards) == len(names)]
    figure = Figure(layout=layout("Front", names[1], names[0], legend=True))
    for what, role in (("baselines", ("baseline",)), ("plans", ("default", "trial"))):
        mine = [t for t in done if t.role in role]
        if mine:
            figure.add_trace(_marks(mine, what, GREY if what == "baselines" else "#4c8dff"))
    front = sorted((t for t in done if t.number in set(record.search.get("front", ()))), key=lambda t: t.rewards[1])
    line = {"color": "#19a979", "width": 2, "shape": "hv" if len(names) == 2 else "linear"}
    figure.add_trace(
        Scatter(
            x=rounded([t.rewards[1] for t in front]),
            y=rounded([t.rewards[0] for t in front]),
            mode="lines+markers" if len(names) == 2 else "markers",
            name="front",
            line=line,
            hoverinfo="skip",
        )
    )
    if is_share(names[0]):
        figure.update_yaxes(tickformat=".3~p")
    return figure


def _marks(trials: list[Trial], what: str, color: str) -> Any:
    from plotly.graph_objects import Scatter

    return Scatter(
        x=rounded([t.rewards[1] for t in trials]),
        y=rounded([t.rewards[0] for t in trials]),
        text=[t.name[:40] for t in trials],
        mode="markers",
        name=what,
        marker={"size": 9, "color": color},
        hovertemplate="%{text}: %{x:.4g}, %{y:.4g}<extra></extra>",
    )


def _goals(record: Record) -> list[Mapping[str, str]]:
    return list(record.search.get("goals", ()))


def _names(record: Record) -> list[str]:
    return [goal["name"] for goal in _goals(record)]


def _arrow(goal: Mapping[str, str]) -> str:
    return "↓" if goal["direction"] == "minimize" else "↑"


def _value(name: str, value: float) -> str:
    return metric_text(name, value) if is_share(name) else number(value)
