"""Knob settings that were better than the default plan in earlier runs on the same model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autopeft.core.codec import decode, encode
from autopeft.core.goals import Goals
from autopeft.core.record import Record
from autopeft.core.space import Space, Value
from autopeft.errors import StoreError, UsageError
from autopeft.search.knobs import complete_values
from autopeft.store.atomic import read_json, write_json
from autopeft.store.paths import RunFolder

__all__ = ["WarmPoint", "kept_points", "warm_points"]

_MOST_PER_RUN = 3
_MOST = 6


@dataclass(frozen=True, slots=True)
class WarmPoint:
    """A knob setting to try first.

    Attributes:
        run: folder of the run it comes from.
        trial: number of the trial there.
        gain: its first goal there, minus the default plan's, positive when better.
        values: every knob of this search's space; those that the run did not have are at their defaults.
    """

    run: str
    trial: int
    gain: float
    values: dict[str, Any]


def warm_points(runs: Sequence[str], fingerprint: str, goals: Goals, space: Space) -> tuple[WarmPoint, ...]:
    """The settings that gained most over the default plan of their own run, at most three per run and six in all.

    Gains compare across data sets where values do not, so that runs on several tasks can be pooled. Only runs on the
    same catalogue count: where a knob says "later blocks", it must mean the same blocks.

    Args:
        runs: run folders with a record.
        fingerprint: of this run's catalogue.
        goals: of this search; runs must have searched for the same first goal.
        space: the knobs.

    Raises:
        StoreError: for a folder without a finished run.
        UsageError: for a run on another model or for another goal.
    """
    found: list[WarmPoint] = []
    for run in runs:
        path = RunFolder(Path(run)).record
        if not path.is_file():
            raise StoreError(f"there is no finished run to start from in {run}: {path.name} is missing")
        record = decode(Record, read_json(path), str(path))
        found += sorted(_better(run, record, fingerprint, goals, space), key=lambda p: (-p.gain, p.trial))[
            :_MOST_PER_RUN
        ]
    distinct: list[WarmPoint] = []
    for point in sorted(found, key=lambda p: -p.gain):
        if all(point.values != other.values for other in distinct):
            distinct.append(point)
    return tuple(distinct[:_MOST])


def kept_points(path: Path, runs: Sequence[str], fingerprint: str, goals: Goals, space: Space) -> tuple[WarmPoint, ...]:
    """As `warm_points`, read once and kept, so that a continued run starts from the same settings.

    Args:
        path: where they are kept.
        runs: as in `warm_points`, like everything else.
        fingerprint: see there.
        goals: see there.
        space: see there.
    """
    if not runs:
        return ()
    if not path.is_file():
        write_json(path, {"points": [encode(point) for point in warm_points(runs, fingerprint, goals, space)]})
    return tuple(decode(WarmPoint, point, str(path)) for point in read_json(path)["points"])


def _better(run: str, record: Record, fingerprint: str, goals: Goals, space: Space) -> list[WarmPoint]:
    other = record.model.get("fingerprint")
    if other != fingerprint:
        raise UsageError(
            f"{run} searched another model ({record.model.get('name')}, catalogue {other}; this is {fingerprint}); "
            "start from runs on the same model"
        )
    theirs = record.search.get("goals") or [{"name": goals.names[0], "direction": goals.directions[0]}]
    if (theirs[0]["name"], theirs[0]["direction"]) != (goals.names[0], goals.directions[0]):
        raise UsageError(f"{run} searched for {theirs[0]['name']}, this search is for {goals.names[0]}")
    default = next((t for t in record.trials if t.role == "default" and t.rewards), None)
    if default is None:
        return []
    sign = 1.0 if goals.directions[0] == "maximize" else -1.0
    points = []
    for trial in record.trials:
        gain = sign * (trial.rewards[0] - default.rewards[0]) if trial.rewards else 0.0
        if trial.role == "trial" and gain > 0:
            points.append(WarmPoint(run, trial.number, gain, _carried(trial.knobs, space)))
    return points


def _carried(knobs: Any, space: Space) -> dict[str, Value]:
    known = {knob.path: knob for knob in space}
    return complete_values(space, {p: v for p, v in knobs.items() if p in known and known[p].holds(v)})
