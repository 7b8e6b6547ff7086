"""Laws of searchers.

Subclass `SearcherLaws` and give `open()`; pytest does the rest. `autopeft.testing.broken_searchers` holds one searcher
per law that breaks this law and no other.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from autopeft.core.contracts import Searcher
from autopeft.core.outcome import Outcome
from autopeft.core.space import Knob, Space, Value

__all__ = ["SearcherLaws", "merit", "play"]

_EPOCHS = 4


def merit(space: Space, values: Mapping[str, Value]) -> float:
    """A smooth function of all knobs that is best away from the middle and from the edges."""
    total = 0.0
    for i, knob in enumerate(space):
        value = values[knob.path]
        if knob.choices:
            place = knob.choices.index(value) / len(knob.choices)
        else:
            assert knob.low is not None
            assert knob.high is not None
            assert not isinstance(value, str)
            place = (value - knob.low) / (knob.high - knob.low or 1.0)
        total -= (place - 0.3 - 0.05 * i) ** 2
    return total


def play(searcher: Searcher, trials: int) -> list[tuple[int, dict[str, Value]]]:
    """Run trials with `merit` as the metric and reward; returns number and values of each."""
    asked = []
    for _ in range(trials):
        suggestion = searcher.ask()
        asked.append((suggestion.number, dict(suggestion.values)))
        value = merit(searcher.space, suggestion.values)
        stopped = False
        for epoch in range(1, _EPOCHS + 1):
            stopped = searcher.report(suggestion.number, epoch, value - 1 / epoch)
            if stopped:
                break
        if stopped:
            searcher.tell(suggestion.number, Outcome("pruned", reason="not among the best"), ())
        else:
            searcher.tell(suggestion.number, Outcome("done", {"merit": value}), (value,))
    return asked


class SearcherLaws:
    """Base class of searchers' tests.

    Attributes:
        space: the space that `open` must search; it has every kind of knob.
        trials: trials before and after a reopening; more than the searcher's random start-up, so that the part that
            learns is tested.
    """

    space: ClassVar[Space] = Space(
        (
            Knob("plain", -1.0, 3.0, default=0.5),
            Knob("log", 1e-4, 1e-1, log=True, default=1e-2),
            Knob("choice", choices=("a", "b", "c"), default="b"),
            Knob("number", choices=(1, 2, 4)),
            Knob("single", 0.25, 0.25),
        )
    )
    trials: ClassVar[int] = 4

    def open(self, folder: Path, seed: int) -> Searcher:
        """Open the searcher of `space`, to be maximised, whose memory is in the folder, as a new process would.

        Whatever an earlier searcher of this folder left running belongs to a process that died.
        """
        raise NotImplementedError

    def test_inside_the_space(self, tmp_path: Path) -> None:
        """Every suggestion has exactly the knobs of the space, each with a value that it holds."""
        searcher = self.open(tmp_path, 1)
        for number, values in play(searcher, 2 * self.trials):
            assert set(values) == {knob.path for knob in self.space}, f"trial {number} has the knobs {sorted(values)}"
            for knob in self.space:
                assert knob.holds(values[knob.path]), f"trial {number} sets {knob.path} to {values[knob.path]!r}"

    def test_fixed_knobs_stay(self, tmp_path: Path) -> None:
        """Knobs that are fixed have the value they were fixed to, and the others are there too."""
        searcher = self.open(tmp_path, 1)
        pins: tuple[dict[str, Value], ...] = ({"plain": -0.75}, {"choice": "c", "log": 0.05})
        for fixed in pins:
            suggestion = searcher.ask(fixed)
            found = {path: suggestion.values[path] for path in fixed}
            assert found == fixed, f"{fixed} was asked for, {found} was suggested"
            assert set(suggestion.values) == {knob.path for knob in self.space}
            searcher.tell(suggestion.number, Outcome("done", {"merit": 0.0}), (0.0,))

    def test_numbers_are_unique(self, tmp_path: Path) -> None:
        """No two trials share a number, also across a reopening."""
        numbers = [number for number, _ in play(self.open(tmp_path, 1), self.trials)]
        numbers += [number for number, _ in play(self.open(tmp_path, 1), self.trials)]
        assert len(set(numbers)) == len(numbers), f"numbers {numbers} repeat"

    def test_same_seed_and_history_ask_the_same(self, tmp_path: Path) -> None:
        """Two searchers with one seed are asked alike as long as they are told alike."""
        folders = [tmp_path / "one", tmp_path / "two"]
        for folder in folders:
            folder.mkdir()
        one, two = (play(self.open(folder, 7), 2 * self.trials) for folder in folders)
        assert one == two, "the same seed and history gave other suggestions"

    def test_history_survives_reopening(self, tmp_path: Path) -> None:
        """A searcher that is closed and opened again goes on as if it had not been."""
        whole, parts = tmp_path / "whole", tmp_path / "parts"
        whole.mkdir()
        parts.mkdir()
        expected = [values for _, values in play(self.open(whole, 7), 2 * self.trials)]
        found = [values for _, values in play(self.open(parts, 7), self.trials)]
        gc.collect()
        found += [values for _, values in play(self.open(parts, 7), self.trials)]
        assert found == expected, "a reopened searcher went another way"

    def test_a_killed_trial_is_asked_again(self, tmp_path: Path) -> None:
        """A trial that was asked and never told is asked again, and the search goes on as if it had been told."""
        whole, parts = tmp_path / "whole", tmp_path / "parts"
        whole.mkdir()
        parts.mkdir()
        expected = [values for _, values in play(self.open(whole, 7), self.trials + 2)]
        searcher = self.open(parts, 7)
        found = [values for _, values in play(searcher, self.trials)]
        lost = dict(searcher.ask().values)
        del searcher
        gc.collect()
        found += [values for _, values in play(self.open(parts, 7), 2)]
        assert lost == expected[self.trials], "the suggestion before the kill is not the unkilled run's"
        assert found == expected, "after a kill the search went another way"

    def test_failed_and_pruned_trials_are_taken(self, tmp_path: Path) -> None:
        """A trial may fail or be pruned, with and without reports, and the search goes on."""
        searcher = self.open(tmp_path, 1)
        for status in ("failed", "pruned"):
            for reports in (0, 1):
                suggestion = searcher.ask()
                for epoch in range(1, reports + 1):
                    answer = searcher.report(suggestion.number, epoch, 0.5)
                    assert isinstance(answer, bool), f"report answers True or False, got {answer!r}"
                searcher.tell(suggestion.number, Outcome(status, reason="on purpose"), ())
        assert len(play(searcher, self.trials)) == self.trials
