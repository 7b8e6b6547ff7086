"""Numbers and bars as text, alike in every table of a report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autopeft.core.outcome import Outcome
from autopeft.core.record import Record

__all__ = [
    "bar",
    "gain_text",
    "is_share",
    "metric_text",
    "number",
    "search_metric",
    "search_sign",
    "share_text",
    "stage_seconds",
]

_SHARES = frozenset({"top1", "top5", "accuracy", "macro_f1", "f1", "mean_class_accuracy", "ece", "miou"})
"""Metrics between 0 and 1 that people read in percent."""

_EIGHTHS = " ▏▎▍▌▋▊▉"


def bar(share: float, width: int = 20) -> str:
    """A horizontal bar of `width` characters for a share between 0 and 1, in eighths of a character."""
    eighths = round(max(0.0, min(1.0, share)) * width * 8)
    full, rest = divmod(eighths, 8)
    return ("█" * full + (_EIGHTHS[rest] if rest else "")).ljust(width)


def number(value: float) -> str:
    """A whole number with thousands separators, or four significant digits."""
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.4g}"


def is_share(name: str) -> bool:
    """Whether people read this metric in percent."""
    return name in _SHARES


def metric_text(name: str, value: float) -> str:
    """A metric as people read it: `87.3 %`, or four significant digits for what is not a share."""
    return f"{100 * value:.1f} %" if name in _SHARES else f"{value:.4g}"


def gain_text(name: str, value: float) -> str:
    """A difference of two metrics, signed: in points for shares."""
    return f"{100 * value:+.1f}" if name in _SHARES else f"{value:+.4g}"


def share_text(part: float, whole: float) -> str:
    """A part in percent of the whole, `-` when there is no whole."""
    return f"{100 * part / whole:.1f} %" if whole else "-"


def stage_seconds(seconds: float) -> str:
    """A time as people read it."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def search_metric(record: Record) -> str:
    """The metric the search saw: the study's reward's, else `top1`, else the first one that was measured."""
    goals = record.search.get("goals")
    named = goals[0]["name"] if goals else _reward(record).get("name")
    measured = list(dict.fromkeys(name for outcome in _outcomes(record) for name in outcome.metrics))
    if isinstance(named, str) and (named in measured or not measured):
        return named
    return "top1" if "top1" in measured or not measured else measured[0]


def search_sign(record: Record) -> int:
    """1 when more of the search metric is better, -1 when less is."""
    goals = record.search.get("goals")
    direction = goals[0]["direction"] if goals else _reward(record).get("direction")
    return -1 if direction == "minimize" else 1


def _reward(record: Record) -> Mapping[str, Any]:
    reward = record.study.get("reward")
    return reward if isinstance(reward, Mapping) else {}


def _outcomes(record: Record) -> list[Outcome]:
    return [t.outcome for t in record.trials] + [o for c in record.contenders for o in c.outcomes]
