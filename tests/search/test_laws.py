from __future__ import annotations

from pathlib import Path

import pytest

from autopeft.core.contracts import Sampler, Searcher
from autopeft.core.goals import Goals
from autopeft.core.space import Space
from autopeft.errors import AutopeftError
from autopeft.search.gp import GP
from autopeft.search.nsga2 import NSGA2
from autopeft.search.optuna_study import OptunaSearcher
from autopeft.search.random import Random
from autopeft.search.tpe import TPE
from autopeft.testing.broken_searchers import BROKEN, NotebookSearcher
from autopeft.testing.searcher_laws import SearcherLaws

ONE = Goals(("merit",), ("maximize",))
LAWS = sorted(name for name in vars(SearcherLaws) if name.startswith("test_"))


def _open(laws: SearcherLaws, folder: Path, seed: int, sampler: Sampler, goals: Goals = ONE) -> Searcher:
    url = f"sqlite:///{folder / 'study.db'}"
    searcher = OptunaSearcher.open(
        url, "laws", laws.space, seed=seed, goals=goals, max_epochs=4, sampler=sampler, eta=2
    )
    searcher.reap()
    return searcher


class TestTPE(SearcherLaws):
    trials = 3

    def open(self, folder: Path, seed: int) -> Searcher:
        return _open(self, folder, seed, TPE(startup=2))


class TestRandom(SearcherLaws):
    trials = 3

    def open(self, folder: Path, seed: int) -> Searcher:
        return _open(self, folder, seed, Random())


class TestNSGA2(SearcherLaws):
    trials = 4

    def open(self, folder: Path, seed: int) -> Searcher:
        return _open(self, folder, seed, NSGA2(population=2))


class TestGP(SearcherLaws):
    trials = 3

    def open(self, folder: Path, seed: int) -> Searcher:
        return _open(self, folder, seed, GP(startup=2))


class TestNotebookSearcher(SearcherLaws):
    def open(self, folder: Path, seed: int) -> Searcher:
        return NotebookSearcher(self.space, folder, seed)


class Broken(SearcherLaws):
    def __init__(self, cls: type[NotebookSearcher]) -> None:
        self.cls = cls

    def open(self, folder: Path, seed: int) -> Searcher:
        return self.cls(self.space, folder, seed)


def test_one_broken_searcher_per_law() -> None:
    assert sorted(BROKEN) == LAWS


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("broken", sorted(BROKEN))
def test_a_broken_searcher_fails_its_law_and_no_other(law: str, broken: str, tmp_path: Path) -> None:
    check = getattr(Broken(BROKEN[broken]), law)
    if law == broken:
        with pytest.raises((AssertionError, AutopeftError)):
            check(tmp_path)
    else:
        check(tmp_path)


def test_the_space_of_the_laws_has_every_kind_of_knob() -> None:
    space: Space = SearcherLaws.space
    assert {bool(k.choices) for k in space} == {True, False}
    assert any(k.log for k in space)
    assert any(k.default is None for k in space)
