"""A searcher that keeps every law, and one per law that breaks it and no other."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autopeft.core.outcome import Outcome
from autopeft.core.space import Knob, Space, Value
from autopeft.errors import UsageError

__all__ = ["BROKEN", "Asked", "NotebookSearcher"]


@dataclass(frozen=True)
class Asked:
    """A suggestion."""

    number: int
    values: Mapping[str, Value]


class NotebookSearcher:
    """Random search with its memory in one JSON file: the plainest searcher that keeps every law.

    Args:
        space: the knobs.
        folder: where the file lies.
        seed: of the draws.
    """

    def __init__(self, space: Space, folder: Path, seed: int) -> None:
        self._space = space
        self._file = folder / "notebook.json"
        self._seed = seed
        self._rows: list[dict[str, Any]] = self._read()
        self._lost = [row for row in self._rows if row["state"] == "running"]

    @property
    def space(self) -> Space:
        """The knobs."""
        return self._space

    def ask(self, fixed: Mapping[str, Value] | None = None) -> Asked:
        """The next trial."""
        if self._lost and not fixed:
            row = self._lost.pop(0)
            return Asked(row["number"], row["values"])
        number = self._number()
        rng = random.Random(self._entropy(number))
        values = {knob.path: self._draw(knob, rng) for knob in self._space}
        values.update(self._pinned(fixed))
        self._rows.append({"number": number, "values": values, "state": "running"})
        self._write()
        return Asked(number, values)

    def report(self, number: int, step: int, value: float) -> bool:
        """Never stops a trial."""
        return False

    def tell(self, number: int, outcome: Outcome, rewards: tuple[float, ...]) -> None:
        """Finish a trial."""
        for row in self._rows:
            if row["number"] == number:
                row["state"] = outcome.status
        self._write()

    def _number(self) -> int:
        return len(self._rows)

    def _entropy(self, number: int) -> str:
        return f"{self._seed} {number}"

    def _pinned(self, fixed: Mapping[str, Value] | None) -> dict[str, Value]:
        return dict(fixed or {})

    def _draw(self, knob: Knob, rng: random.Random) -> Value:
        if knob.choices:
            choice: Value = rng.choice(knob.choices)
            return choice
        assert knob.low is not None
        assert knob.high is not None
        if knob.log:
            return math.exp(rng.uniform(math.log(knob.low) + 1e-9, math.log(knob.high) - 1e-9))
        return rng.uniform(knob.low, knob.high)

    def _read(self) -> list[dict[str, Any]]:
        return list(json.loads(self._file.read_text())) if self._file.is_file() else []

    def _write(self) -> None:
        self._file.write_text(json.dumps(self._rows))


class _Outside(NotebookSearcher):
    def _draw(self, knob: Knob, rng: random.Random) -> Value:
        value = super()._draw(knob, rng)
        return 2 * knob.high if knob.log and knob.high is not None else value


class _Deaf(NotebookSearcher):
    def _pinned(self, fixed: Mapping[str, Value] | None) -> dict[str, Value]:
        return {}


class _Repeating(NotebookSearcher):
    """Numbers trials from 0 in every process; the history itself is kept."""

    def ask(self, fixed: Mapping[str, Value] | None = None) -> Asked:
        if not hasattr(self, "_offset"):
            self._offset = len([row for row in self._rows if row["state"] != "running"])
        asked = super().ask(fixed)
        return Asked(asked.number - self._offset, asked.values)

    def tell(self, number: int, outcome: Outcome, rewards: tuple[float, ...]) -> None:
        super().tell(number + self._offset, outcome, rewards)


class _Whimsical(NotebookSearcher):
    """Draws depend on the folder, so that one search is repeatable and two are not alike."""

    def _entropy(self, number: int) -> str:
        name = self._file.parent.name
        return super()._entropy(number) + (name if name in ("one", "two") else "")


class _Forgetful(NotebookSearcher):
    """Counts its draws in memory: reopened, it draws the first ones again, unless a trial was lost."""

    def __init__(self, space: Space, folder: Path, seed: int) -> None:
        super().__init__(space, folder, seed)
        self._drawn = len(self._rows) if self._lost else 0

    def _entropy(self, number: int) -> str:
        self._drawn += 1
        return super()._entropy(self._drawn - 1)


class _Heartless(NotebookSearcher):
    """Leaves killed trials behind."""

    def __init__(self, space: Space, folder: Path, seed: int) -> None:
        super().__init__(space, folder, seed)
        self._lost = []


class _Fragile(NotebookSearcher):
    def tell(self, number: int, outcome: Outcome, rewards: tuple[float, ...]) -> None:
        if outcome.status == "failed":
            raise UsageError("this searcher takes no failed trials")
        super().tell(number, outcome, rewards)


BROKEN: dict[str, type[NotebookSearcher]] = {
    "test_inside_the_space": _Outside,
    "test_fixed_knobs_stay": _Deaf,
    "test_numbers_are_unique": _Repeating,
    "test_same_seed_and_history_ask_the_same": _Whimsical,
    "test_history_survives_reopening": _Forgetful,
    "test_a_killed_trial_is_asked_again": _Heartless,
    "test_failed_and_pruned_trials_are_taken": _Fragile,
}
"""Law to the searcher that breaks it."""
