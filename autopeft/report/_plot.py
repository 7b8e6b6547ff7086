"""The look that all figures share, and what keeps them small."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

__all__ = ["GREY", "digits", "layout", "rounded", "scale_axis", "thin", "tick"]

GREY = "#7f8794"
_MOST_POINTS = 60


def layout(title: str, x: str, y: str, *, legend: bool = False) -> dict[str, Any]:
    """A layout without template: transparent, mid-grey text and thin lines, room for a legend below the axis."""
    axis = {"gridcolor": "rgba(127,135,148,0.22)", "zeroline": False, "linecolor": "rgba(127,135,148,0.5)"}
    return {
        "template": "none",
        "title": {"text": title, "x": 0.01, "xanchor": "left", "font": {"size": 15}},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"color": GREY, "size": 12},
        "margin": {"l": 60, "r": 20, "t": 44, "b": 104 if legend else 48},
        "height": 380 if legend else 324,
        "legend": {"orientation": "h", "y": 0, "yref": "container", "yanchor": "bottom", "x": 0, "font": {"size": 11}},
        "xaxis": {**axis, "title": {"text": x, "standoff": 6}},
        "yaxis": {**axis, "title": {"text": y, "standoff": 8}, "automargin": True},
    }


def scale_axis(figure: Figure, share: bool) -> Figure:
    """Percent on the vertical axis of a metric that people read in percent."""
    if share:
        figure.update_yaxes(tickformat=".3~p")
    return figure


def thin(curve: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most 60 points of a curve, the first and the last among them."""
    if len(curve) <= _MOST_POINTS:
        return list(curve)
    step = (len(curve) - 1) / (_MOST_POINTS - 1)
    return [curve[round(i * step)] for i in range(_MOST_POINTS)]


def tick(n: int) -> int:
    """Distance of the ticks on an axis of `n` blocks, so that at most 16 are shown."""
    return max(1, math.ceil(n / 16))


def digits(value: float) -> float:
    """The value to five significant digits."""
    return float(f"{value:.5g}")


def rounded(values: Iterable[float]) -> list[float]:
    """The values to five significant digits: half the JSON."""
    return [digits(value) for value in values]
