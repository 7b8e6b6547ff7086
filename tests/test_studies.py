"""The arithmetic that studies draw conclusions with, against numbers worked by hand."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

STUDIES = Path(__file__).parent.parent / "studies"


def loaded(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.replace("/", "_").removesuffix(".py"), STUDIES / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def inference() -> ModuleType:
    return loaded("budget_frontier/inference.py")


def test_signs_are_flipped_exactly(inference: ModuleType) -> None:
    # Of the eight sign patterns of 1, 2, 3 two have a sum as far from 0 as 6; of 1, -2, 3 six have one as far as 2.
    assert inference.sign_flip([1.0, 2.0, 3.0]) == 2 / 8
    assert inference.sign_flip([1.0, -2.0, 3.0]) == 6 / 8
    assert inference.sign_flip([0.0, 0.0]) == 1.0
    with pytest.raises(ValueError, match="20 at most"):
        inference.sign_flip([1.0] * 21)


def test_holm_steps_down(inference: ModuleType) -> None:
    # 3 x 0.01, 2 x 0.03, then 1 x 0.04 is raised to what came before it.
    assert inference.holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})
    assert inference.holm({"a": 0.9, "b": 0.8}) == {"b": 1.0, "a": 1.0}


def test_fronts_and_what_they_cover(monkeypatch: pytest.MonkeyPatch) -> None:
    """(2, 2) and (1, 4) are in front of (3, 3) and (2, 4); a point covers what is no better in either number."""
    monkeypatch.setitem(sys.modules, "run", loaded("memcontrol/run.py"))
    gradient = loaded("memcontrol/gradient.py")
    ours = gradient.front([(2.0, 2.0), (3.0, 3.0), (1.0, 4.0), (2.0, 4.0)])
    assert ours == [(2.0, 2.0), (1.0, 4.0)]
    theirs = [(2.0, 2.0), (0.5, 5.0), (4.0, 1.0), (1.0, 4.5)]
    assert gradient.coverage(ours, theirs) == 2 / 4
    assert gradient.coverage(theirs, ours) == 1 / 2
    # The best loss is the second's; at most 3 remembered leaves the first alone.
    outer = {"price 0": (2.0, 2.0), "price 1": (1.0, 4.0)}
    assert gradient.chosen(outer, 3.0)["priced, epsilon"] == "price 0"
    assert gradient.chosen(outer, 5.0)["priced, epsilon"] == "price 1"


@pytest.mark.parametrize(
    ("natural", "specialized", "structured", "of_groups", "of_tasks"),
    [(82.7, 86.1, 61.8, 76.9, 74.6), (81.9, 85.9, 61.3, 76.4, 74.1)],
    ids=["SNELL-32", "SPT-LoRA"],
)
def test_two_means_of_vtab_are_told_apart(
    inference: ModuleType, natural: float, specialized: float, structured: float, of_groups: float, of_tasks: float
) -> None:
    """Oracle T26, from the published means of the 7, 4 and 8 tasks of the groups."""
    # Tasks that differ, with the published mean.
    found = inference.grouped_means(
        {
            "natural": natural + np.arange(-3, 4),
            "specialized": specialized + np.array([-2, -1, 1, 2]),
            "structured": structured + np.array([-4, -3, -2, -1, 1, 2, 3, 4]),
        }
    )
    assert [round(value, 1) for value in found] == [of_groups, of_tasks]


def test_the_bootstrap_knows_a_difference_from_none(inference: ModuleType) -> None:
    rng = np.random.default_rng(1)
    none = [rng.integers(-1, 2, (3, 200)).astype(float) for _ in range(4)]
    mean, low, high = inference.bootstrap(none, draws=500)
    assert low < 0 < high
    assert mean == pytest.approx(np.mean([cell.mean() for cell in none]))
    assert inference.bootstrap([np.ones((3, 50))] * 2, draws=50) == (1.0, 1.0, 1.0)
    # One cell of n samples that are right with probability p: the interval is about 1.96 standard errors to each side.
    one = (rng.random((1, 400)) < 0.5).astype(float)
    mean, low, high = inference.bootstrap([one], draws=4000)
    assert (high - low) / 2 == pytest.approx(1.96 * np.sqrt(mean * (1 - mean) / 400), rel=0.1)


def test_the_gap_closed_is_a_ratio_of_sums(inference: ModuleType) -> None:
    gains, gaps = [np.full((2, 10), 0.1), np.full((2, 10), 0.3)], [np.full((2, 10), 0.2), np.full((2, 10), 0.3)]
    share, low, high = inference.gap_closed(gains, gaps, draws=200)
    assert share == pytest.approx(0.4 / 0.5)
    # Cells are drawn with replacement: twice the first gives a half, twice the second one.
    assert low == pytest.approx(0.5)
    assert high == pytest.approx(1.0)
