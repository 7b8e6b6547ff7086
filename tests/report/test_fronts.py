from __future__ import annotations

import dataclasses

import pytest

from autopeft.core.outcome import Outcome
from autopeft.core.record import Record, Trial
from autopeft.report._text import search_metric, search_sign
from autopeft.report.fronts import front_figure, front_table
from autopeft.report.html import render_html
from autopeft.report.markdown import render_markdown

GOALS = [{"name": "top1", "direction": "maximize"}, {"name": "parameters", "direction": "minimize"}]


@pytest.fixture
def two(record: Record) -> Record:
    """Trials 2, 3, 5 and 6: 0.86 for 100, 0.90 for 100, 0.80 for 20, 0.79 for 50, of which 3 and 5 are the front."""
    found = [dataclasses.replace(t, rewards=(t.rewards[0], float(t.spent))) if t.rewards else t for t in record.trials]
    for number, value, spent in ((5, 0.80, 20), (6, 0.79, 50)):
        outcome = Outcome("done", {"top1": value}, trainable=spent)
        mix = {"core": spent}
        found.append(Trial(number, f"trial {number}", "trial", {}, "d", spent, mix, outcome, (value, float(spent))))
    return dataclasses.replace(record, trials=tuple(found), search={"goals": GOALS, "mode": "pareto", "front": [3, 5]})


def test_the_front_is_listed_by_the_first_goal_with_a_star(two: Record) -> None:
    table = front_table(two)
    assert table.header == ("#", "plan", "top1 ↑", "parameters ↓", "spent", "methods")
    assert table.rows == (
        ("3*", "trial 3", "90.0 %", "100", "100", "core 75 %, bias 25 %"),
        ("5", "trial 5", "80.0 %", "20", "20", "core 100 %"),
    )


def test_one_goal_has_no_front(record: Record) -> None:
    assert front_table(record).rows == ()
    assert front_table(dataclasses.replace(record, search={"goals": GOALS[:1], "front": []})).rows == ()
    assert "## Front" not in render_markdown(record)


def test_the_figure_draws_the_front_through_its_trials(two: Record) -> None:
    traces = {trace.name: trace for trace in front_figure(two).data}
    assert list(traces["front"].x) == [20, 100]
    assert list(traces["front"].y) == [0.8, 0.9]
    assert len(traces["baselines"].x) == 2
    assert len(traces["plans"].x) == 4


def test_the_pages_show_it(two: Record) -> None:
    assert "## Front" in render_markdown(two)
    page = render_html(two)
    assert 'id="figure-front"' in page
    assert "<h2>Front</h2>" in page


def test_the_goals_name_the_metric_and_its_direction(record: Record) -> None:
    goals = [{"name": "nll", "direction": "minimize"}]
    found = dataclasses.replace(record, search={"goals": goals})
    assert (search_metric(found), search_sign(found)) == ("nll", -1)
    assert (search_metric(record), search_sign(record)) == ("top1", 1)
