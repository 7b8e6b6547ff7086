"""Rewards with several goals, from the command line to the report."""

import json

import pytest
from typer.testing import CliRunner

from autopeft.cli.main import app
from autopeft.core.codec import decode
from autopeft.core.goals import Goals
from autopeft.core.record import Record


@pytest.fixture(autouse=True)
def light(monkeypatch):
    """Without exports and the dataflow graph, which other tests look at and which take most of the time."""
    monkeypatch.setattr("autopeft.pipeline.conclude.deliver", lambda *args, **kwargs: {})
    monkeypatch.setattr("autopeft.pipeline.conclude.dataflow", lambda *args, **kwargs: None)


def search(small, pictures, folder, *settings):
    flags = ["search", *small, "--data", pictures, "--methods", "core,bias,norm", "--epochs", "2", "-o", folder]
    flags += ["--trials", "4", "--seeds", "1", "--json"]
    reward = "reward={type: joint, parts: [metric, parameters]}"
    flags += ["--space", "tradeoff", "search.tries=1", reward, *settings]
    result = CliRunner().invoke(app, [str(flag) for flag in flags], catch_exceptions=False)
    assert result.exit_code in (0, 7), result.stderr
    return decode(Record, json.loads((folder / "record.json").read_text()))


def test_a_front_of_accuracy_and_parameters(small, pictures, tmp_path):
    record = search(small, pictures, tmp_path / "front", "search.sampler={type: nsga2, population: 4}")
    goals = Goals(("top1", "parameters"), ("maximize", "minimize"))
    assert record.search["mode"] == "pareto"
    assert record.search["sampler"] == "nsga2"
    ours = [t for t in record.trials if t.role != "baseline" and t.rewards]
    assert all(t.rewards == (t.outcome.metrics["top1"], float(t.outcome.trainable)) for t in ours)
    assert all(t.outcome.status != "pruned" for t in record.trials)
    assert set(record.search["front"]) == {ours[i].number for i in goals.on_front([t.rewards for t in ours])}
    assert record.best in record.search["front"]
    assert min(t.spent for t in ours) < record.budget["limit"] // 2, "plans of less than the budget are tried"
    assert "## Front" in (tmp_path / "front" / "report.md").read_text()
    assert 'id="figure-front"' in (tmp_path / "front" / "report.html").read_text()


def test_the_best_plan_within_a_limit(small, pictures, tmp_path):
    whole = int(0.05 * 7_000)
    record = search(small, pictures, tmp_path / "limit", f"search.limits.parameters={whole // 2}")
    assert record.search["mode"] == "epsilon"
    ours = [t for t in record.trials if t.role != "baseline" and t.rewards]
    kept = [t for t in ours if t.rewards[1] <= whole // 2]
    best = next(t for t in record.trials if t.number == record.best)
    assert kept, "no trial keeps to the limit, so that the test shows nothing"
    assert best in kept
    # Among these the likelihood decides, as it does between all classifiers.
    assert best.outcome.metrics["scaled_nll"] == min(t.outcome.metrics["scaled_nll"] for t in kept)
