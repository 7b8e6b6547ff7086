"""What a search may cost: tiers, the race, and settings of earlier runs."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

from autopeft.cli.main import app
from autopeft.config.study import Study
from autopeft.core.codec import decode, encode
from autopeft.core.goals import Goals
from autopeft.core.outcome import Outcome
from autopeft.core.record import Record, Trial
from autopeft.core.space import Knob, Space
from autopeft.errors import StoreError, UsageError
from autopeft.pipeline.costs import TIERS, full_training, run_cost
from autopeft.pipeline.effort import Effort
from autopeft.pipeline.finish import Finalist
from autopeft.pipeline.ledger import Entry
from autopeft.pipeline.planfile import read_plan
from autopeft.pipeline.playoff import play_off, playoff_cost
from autopeft.pipeline.race import plan_race
from autopeft.pipeline.runner import Runner
from autopeft.pipeline.warm import kept_points, warm_points

SPACE = Space((Knob("gain.exponent", 0.2, 1.0, default=0.5), Knob("gain.depth_tilt", -2, 2, default=0)))
ONE = Goals(("top1",), ("maximize",))


@pytest.fixture(autouse=True)
def light(monkeypatch):
    """Without exports and the dataflow graph, which other tests look at and which take most of the time."""
    monkeypatch.setattr("autopeft.pipeline.conclude.deliver", lambda *args, **kwargs: {})
    monkeypatch.setattr("autopeft.pipeline.conclude.dataflow", lambda *args, **kwargs: None)


def prepared(inner, outer):
    return SimpleNamespace(task=SimpleNamespace(sizes={"inner": inner, "outer": outer, "test": 9}))


def test_the_unit_and_the_price_of_a_training_by_hand():
    # 10 epochs of 1,000 and 400; three epochs, watched after each and measured once: 4 predictions at half a pass.
    assert full_training(prepared(1000, 400), Effort(10, 3)) == 14_000
    assert run_cost(prepared(1000, 400), 3, 1.0, 4) == 3000 + 0.5 * 4 * 400
    assert run_cost(prepared(1000, 400), 30, 0.1) == 3000 + 200


def test_the_race_as_planned_where_it_can_be_paid_for():
    # 3, 9 and 27 % of 100 epochs of 1,100: 3, 9 and 29 epochs of 1,000; 11, 3 and 1 trainings.
    ladder = plan_race(prepared(1000, 100), Effort(100, 33), 110_000, 110_000, arms=9)
    assert (ladder.arms, ladder.replicates, ladder.epochs) == (9, 2, (3, 9, 29))
    cost = 11 * 3050 + 3 * 9050 + 29_050
    assert plan_race(prepared(1000, 100), Effort(100, 33), 110_000, cost, 9).arms == 9
    assert plan_race(prepared(1000, 100), Effort(100, 33), 110_000, cost - 1, 9).arms == 8


def test_a_race_that_is_too_dear_has_fewer_candidates_then_fewer_rungs():
    short = Effort(4, 1)
    full = full_training(prepared(1000, 100), short)
    ladder = plan_race(prepared(1000, 100), short, full, full, 9)
    prices = [run_cost(prepared(1000, 100), e, 1.0) for e in ladder.epochs]
    assert ladder.epochs[0] == 1
    assert 2 <= ladder.arms < 9
    assert (ladder.arms + ladder.replicates) * prices[0] + sum(prices[1:]) <= full
    with pytest.raises(UsageError, match="a race of two candidates needs 2,100 passes and has 2,000"):
        plan_race(prepared(1000, 100), short, full, 2000, 9)


def run(small, pictures, folder, *flags):
    command = ["search", *small, "--data", pictures, "--seeds", "1", "-o", folder, "--methods", "core,bias,norm"]
    command += ["search.tries=1", *flags, "--json"]
    result = CliRunner().invoke(app, [str(flag) for flag in command], catch_exceptions=False)
    assert result.exit_code in (0, 7), result.stderr
    return decode(Record, json.loads((folder / "record.json").read_text()))


OURS = ("scoring", "head", "svd", "default", "race", "search", "failed")


def units(record):
    return sum(v for k, v in record.costs.items() if k in OURS) / record.costs["full_training"]


@pytest.mark.slow
def test_the_tier_race(small, pictures, tmp_path):
    record = run(small, pictures, tmp_path / "race", "--tier", "race", "--epochs", "14")
    assert units(record) <= TIERS["race"]
    best = next(t for t in record.trials if t.number == record.best)
    assert (best.role, best.name.split(":")[0]) == ("trial", "race winner")
    raced = record.search["race"]
    assert [len(rung["arms"]) for rung in raced["rungs"]] == sorted(
        (len(rung["arms"]) for rung in raced["rungs"]), reverse=True
    )
    assert raced["rungs"][0]["epochs"] < raced["rungs"][-1]["epochs"] <= 14
    assert len(raced["rungs"][0]["arms"]) == raced["entered"] > 2
    assert raced["rungs"][-1]["arms"][0]["name"] == best.name.split(": ")[1]
    assert not any(t.role == "default" for t in record.trials)
    assert record.costs["baselines"] > 0
    # What was chosen by short trainings is trained in full at the end.
    sizes = record.data["sizes"]
    per_seed = 14 * (sizes["inner"] + sizes["outer"])
    assert record.costs["full_training"] == per_seed
    assert record.costs["finish"] >= per_seed


def test_the_tier_default(small, pictures, tmp_path):
    record = run(small, pictures, tmp_path / "default", "--tier", "default", "--epochs", "14")
    assert units(record) <= TIERS["default"]
    best = next(t for t in record.trials if t.number == record.best)
    assert best.role == "default"
    assert not any(t.role == "trial" for t in record.trials)
    assert "race" not in record.costs
    # No three runs of a third of a training fit into 0.3 of one, and shorter ones choose no rate.
    assert read_plan(tmp_path / "default" / best.plan).study["train"]["lr_scale"] == 1.0


@pytest.mark.slow
def test_the_tier_search(small, pictures, tmp_path):
    """Short trials that choose among settings, and a winner that is trained in full."""
    record = run(small, pictures, tmp_path / "search", "--tier", "search", "--epochs", "12")
    assert units(record) <= TIERS["search"]
    ours = [t for t in record.trials if t.role in ("default", "trial")]
    assert len(ours) >= 4
    assert {t.fidelity for t in ours if t.outcome.status == "done"} == {4 * record.data["sizes"]["inner"]}
    assert all(t.spent <= record.budget["limit"] for t in record.trials)
    full = 12 * (record.data["sizes"]["inner"] + record.data["sizes"]["outer"])
    assert record.costs["full_training"] == full
    assert record.costs["finish"] >= full
    # The best of them ran in full at two rates before anything was retrained, within the tier.
    finals = [t for t in record.trials if t.role == "full"]
    assert [t.fidelity for t in finals] == [12 * record.data["sizes"]["inner"]] * 2
    assert len({t.digest for t in finals}) == 1
    assert record.best == max(finals, key=lambda t: -t.outcome.metrics["scaled_nll"]).number
    assert record.contenders[0].role == "full"
    rates = {read_plan(tmp_path / "search" / t.plan).study["train"]["lr_scale"] for t in finals}
    assert max(rates) / min(rates) == pytest.approx(10**0.5)


def test_a_playoff_is_two_whole_trainings_and_its_better_one_comes_first():
    base = Study()
    study = dataclasses.replace(base, train=dataclasses.replace(base.train, epochs=4, lr_scale=0.5))
    asked = []

    class Stub(Runner):
        def train(self, study, allocation, **kwargs):
            asked.append((study.train.epochs, study.train.data_fraction, study.train.lr_scale, kwargs["stage"]))
            losses = iter((0.4, 0.3)[len(asked) - 1 :])
            metrics = {"top1": 0.5, "nll": 1.0, "scaled_nll": next(losses)}
            return Entry(Outcome("done", metrics), np.zeros(0, dtype=bool), 0, "key")

    ground = prepared(1000, 400)
    short = Finalist("trial 3", 3, "trial", study, SimpleNamespace())
    ran = play_off(Stub(ground, None, lambda event: None), short, Effort(12, 4, 0.5))
    assert asked == [(12, 0.5, 0.5, "search"), (12, 0.5, pytest.approx(0.5 * 10**0.5), "search")]
    assert [one.name for one, _ in ran] == ["trial 3 in full, learning rate x3.2", "trial 3 in full"]
    assert playoff_cost(ground, Effort(12, 4, 0.5)) == 2 * (6 * 1000 + 0.5 * 400)


def earlier(folder, fingerprint="abc", metric="top1"):
    """A finished run whose trials 2 and 4 are better than its default plan, and 3 is not."""

    def trial(number, role, value, **knobs):
        outcome = Outcome("done", {metric: value})
        return Trial(number, f"trial {number}", role, knobs, "d", 1, {}, outcome, (value,))

    trials = (
        trial(0, "baseline", 0.99, **{"gain.exponent": 0.3}),
        trial(1, "default", 0.70, **{"gain.exponent": 0.5}),
        trial(2, "trial", 0.75, **{"gain.exponent": 0.9, "train.lr.core": 0.1}),
        trial(3, "trial", 0.60, **{"gain.exponent": 0.4}),
        trial(4, "trial", 0.80, **{"gain.exponent": 7.0, "gain.depth_tilt": 1.5}),
    )
    goals = [{"name": metric, "direction": "maximize"}]
    model = {"name": "tiny", "fingerprint": fingerprint}
    record = Record(str(folder), {}, model, {}, {}, trials, 4, search={"goals": goals})
    folder.mkdir()
    (folder / "record.json").write_text(json.dumps(encode(record)))
    return folder


def test_settings_that_beat_the_default_come_back_by_their_gain(tmp_path):
    run = str(earlier(tmp_path / "old"))
    points = warm_points([run], "abc", ONE, SPACE)
    assert [(p.trial, pytest.approx(p.gain)) for p in points] == [(4, 0.1), (2, 0.05)]
    # A value outside of today's range is not carried over; knobs that are gone are not either.
    assert [dict(p.values) for p in points] == [
        {"gain.exponent": 0.5, "gain.depth_tilt": 1.5},
        {"gain.exponent": 0.9, "gain.depth_tilt": 0},
    ]
    assert {p.run for p in points} == {run}


def test_they_are_read_once(tmp_path):
    run = earlier(tmp_path / "old")
    first = kept_points(tmp_path / "warm.json", [str(run)], "abc", ONE, SPACE)
    (run / "record.json").unlink()
    assert kept_points(tmp_path / "warm.json", [str(run)], "abc", ONE, SPACE) == first
    assert kept_points(tmp_path / "none.json", [], "abc", ONE, SPACE) == ()


def test_only_runs_on_the_same_model_and_goal_count(tmp_path):
    other = str(earlier(tmp_path / "other", fingerprint="xyz"))
    with pytest.raises(UsageError, match="searched another model"):
        warm_points([other], "abc", ONE, SPACE)
    nll = str(earlier(tmp_path / "nll", metric="nll"))
    with pytest.raises(UsageError, match="searched for nll, this search is for top1"):
        warm_points([nll], "abc", ONE, SPACE)
    with pytest.raises(StoreError, match="no finished run"):
        warm_points([str(tmp_path / "gone")], "abc", ONE, SPACE)


@pytest.mark.slow
def test_a_search_starts_from_earlier_runs_and_stops_by_its_rule(small, pictures, tmp_path):
    """Two runs: what the first found is tried first in the second, which a generous bound ends after five trials."""
    first = run(small, pictures, tmp_path / "first", "--trials", "2", "--epochs", "1")
    changed = [
        dataclasses.replace(t, rewards=(0.0,)) if t.role == "default" else t for t in first.trials
    ]  # So that something is better than the default plan, whatever the machine.
    record = dataclasses.replace(first, trials=tuple(changed))
    (tmp_path / "first" / "record.json").write_text(json.dumps(encode(record)))
    flags = ["--trials", "9", "--epochs", "1", "--warm-start", tmp_path / "first", "search.stop_delta=1000"]
    second = run(small, pictures, tmp_path / "second", *flags)
    points = second.search["warm_start"]
    assert points
    ours = [t for t in second.trials if t.role == "trial"]
    assert [dict(t.knobs) for t in ours[: len(points)]] == [p["values"] for p in points]
    assert len(ours) == 5
    assert 0 <= second.search["certificate"]["delta"] <= 1000
