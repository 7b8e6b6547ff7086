"""A winner that is packed again while it trains: within its budget at every step, replayable, kept only if better."""

import dataclasses
import functools
import json
import signal

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autopeft.allocation.indices import attach_indices
from autopeft.allocation.knapsack import Knapsack
from autopeft.allocation.random import RandomMix
from autopeft.core.allocation import Allocation
from autopeft.core.outcome import Outcome
from autopeft.errors import CorruptFile, InfeasibleBudget, Preempted, UsageError
from autopeft.methods.core import CoreAdapter
from autopeft.methods.lora import LoRAAdapter
from autopeft.pipeline import repack as module
from autopeft.pipeline.events import silent
from autopeft.pipeline.finish import Finalist
from autopeft.pipeline.ledger import Entry, Ledger
from autopeft.pipeline.phases import FirstPhase, train_first
from autopeft.pipeline.plan import make_menu
from autopeft.pipeline.planfile import read_plan, write_plan
from autopeft.pipeline.planning import as_plan
from autopeft.pipeline.repack import Repacked, repack, repack_plan, wants_repacking
from autopeft.pipeline.replay import replay
from autopeft.pipeline.runner import Runner
from autopeft.pipeline.search import run_search
from autopeft.pipeline.trial import run_trial
from autopeft.store.paths import RunFolder
from autopeft.training import preempt
from autopeft.training.checkpoint import load_adapter
from autopeft.training.handover import retained

SHARE = 0.7
"""Low, so that a training of a few steps has something to cut."""


@pytest.fixture(scope="module")
def three(study):
    return dataclasses.replace(study, train=dataclasses.replace(study.train, epochs=3))


@pytest.fixture(scope="module")
def first(prepared, three):
    menu = make_menu(prepared, three).only(("core", "lora", "bias"))
    return FirstPhase(RandomMix().allocate(menu, prepared.budget, 1), 1)


@pytest.fixture(scope="module")
def second(prepared, three, first):
    return repack_plan(prepared, three, first, share=SHARE)


@settings(max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 10**6))
def test_no_phase_of_any_plan_is_above_the_budget(prepared, three, seed):
    menu = make_menu(prepared, three)
    drawn = RandomMix().allocate(menu, prepared.budget, seed)
    drawn = attach_indices(drawn, three.methods, prepared.scores, menu.sites)
    one = dataclasses.replace(three, train=dataclasses.replace(three.train, epochs=2))
    start = FirstPhase(drawn, 1)
    plan, seen = repack_plan(prepared, one, start)
    assert seen == prepared.task.sizes["inner"] + prepared.scores.origin.n_samples
    assert plan.spent <= prepared.budget.limit
    result = run_trial(prepared, one, plan, seed=0, folder=None, first=start)
    # Options, model, optimizer and file were compared in both phases, or this would have raised.
    assert result.outcome.trainable == plan.trainable <= prepared.budget.limit
    assert {o.key for o in drawn} <= {o.key for o in plan}, "an option that is there is cut, and never dropped"


def test_what_is_cut_holds_what_it_must_and_no_size_less_would(prepared, three, first, second):
    trained = train_first(prepared, three, first, seed=three.seed, folder=None, splits=("inner",))
    kept = {o.key: o for o in second[0]}
    with three.backend.insert(
        prepared.model, prepared.catalog, first.allocation, three.methods, seed=three.seed, head=prepared.head
    ) as inserted:
        inserted.load_state(trained.state)
        changed = 0
        for option in first.allocation:
            adapter = inserted.named_adapters()[option.key]
            now = kept[option.key].size
            if isinstance(adapter, LoRAAdapter | CoreAdapter) and now < option.size:
                changed += 1
                assert retained(adapter, now) >= SHARE
                smaller = [k for k in three.methods[option.method].sizes(prepared.catalog[option.site]) if k < now]
                # It may have been cut further and grown again, never below what must be held.
                assert all(retained(adapter, k) < SHARE for k in smaller) or now > min(smaller)
            elif not isinstance(adapter, LoRAAdapter | CoreAdapter):
                assert kept[option.key] == dataclasses.replace(option, gain=kept[option.key].gain)
    assert changed
    assert second[0].digest != first.allocation.digest


def test_the_second_plan_is_deterministic_and_the_model_is_given_back(prepared, three, first, second):
    before = {name: t.clone() for name, t in prepared.model.state_dict().items()}
    again = repack_plan(prepared, three, first, share=SHARE)
    assert again[0].digest == second[0].digest
    assert all(torch.equal(t, before[name]) for name, t in prepared.model.state_dict().items())


def test_a_repacked_plan_replays_to_its_metric(prepared, three, first, second, tmp_path):
    done = run_trial(prepared, three, second[0], seed=0, folder=tmp_path / "once", first=first)
    assert not list((tmp_path / "once").glob("checkpoint*"))
    assert done.sample_epochs == 3 * prepared.task.sizes["inner"]
    write_plan(as_plan(prepared, three, second[0], first=first), tmp_path / "plan.json")
    plan = read_plan(tmp_path / "plan.json")
    assert plan.first == first
    again = replay(plan, tmp_path / "again")
    assert again.result.outcome.metrics == done.outcome.metrics
    assert read_plan(tmp_path / "again" / "plan.json").first == first
    plain = run_trial(prepared, three, second[0], seed=0, folder=None)
    assert plain.outcome.metrics != done.outcome.metrics

    data = json.loads((tmp_path / "plan.json").read_text())
    data["first"]["options"].pop()
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(CorruptFile, match="first phase"):
        read_plan(tmp_path / "plan.json")


@pytest.mark.parametrize("steps", [1, 5])
def test_stopped_in_either_phase_and_continued_is_the_same_training(
    prepared, three, first, second, tmp_path, monkeypatch, steps
):
    whole = run_trial(prepared, three, second[0], seed=0, folder=tmp_path / "whole", first=first)
    asked = iter(range(10**6))

    def ask():
        if next(asked) == steps:
            signal.raise_signal(signal.SIGTERM)
        return bool(preempt._received)

    with monkeypatch.context() as patch, preempt.preemptible():
        patch.setattr(preempt, "requested", ask)
        with pytest.raises(Preempted):
            run_trial(prepared, three, second[0], seed=0, folder=tmp_path / "cut", first=first)
    assert list((tmp_path / "cut").glob("checkpoint*"))
    again = run_trial(prepared, three, second[0], seed=0, folder=tmp_path / "cut", first=first)
    assert again.outcome.metrics == whole.outcome.metrics
    assert again.adapter is not None
    assert whole.adapter is not None
    found, wanted = load_adapter(again.adapter), load_adapter(whole.adapter)
    assert list(found) == list(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


class Scripted(Runner):
    """Trainings whose hits are given."""

    def train(self, study, allocation, *, first=None, **kwargs):
        self.asked.append((kwargs["seed"], first is not None))
        rng = np.random.default_rng(kwargs["seed"])
        hits = rng.random(400) < (0.6 + self.better * (first is not None))
        return Entry(Outcome("done", metrics={"top1": float(hits.mean())}), hits, 0)


@pytest.mark.parametrize(("better", "kept"), [(0.2, True), (0.0, False), (-0.2, False)])
def test_kept_only_if_the_paired_test_says_so(prepared, three, first, second, tmp_path, monkeypatch, better, kept):
    monkeypatch.setattr(module, "repack_plan", lambda *args: second)
    runner = Scripted(prepared, Ledger(tmp_path / "ledger"), silent)
    runner.better, runner.asked = better, []
    winner = Finalist("trial 7", 7, "trial", three, first.allocation)
    found = repack(runner, winner, tmp_path / "repack")
    assert (found.finalist is not None) == kept
    assert found.sample_epochs == second[1]
    seeds = [three.seed + i for i in range(three.search.seeds)]
    assert runner.asked == [(seed, twice) for seed in seeds for twice in (False, True)]
    if found.finalist is not None:
        assert found.finalist.first == first
        assert found.finalist.allocation == second[0]
    else:
        # What was found not to help is not tried again.
        runner.asked = []
        assert repack(runner, winner, tmp_path / "repack") == Repacked(None, found.reason, found.sample_epochs)
        assert not runner.asked


def test_short_trainings_empty_plans_and_time_limits_are_left_alone(prepared, study, three, first, tmp_path):
    runner = Scripted(prepared, Ledger(tmp_path / "ledger"), silent)
    short = Finalist("a", 0, "trial", study, first.allocation)
    empty = Finalist("a", 0, "trial", three, Allocation((), prepared.budget))
    assert repack(runner, short, tmp_path).finalist is None
    assert repack(runner, empty, tmp_path).finalist is None
    for repack_it, limit, wanted in (("auto", None, True), ("auto", 60.0, False), ("off", None, False)):
        search = dataclasses.replace(three.search, repack=repack_it, time_limit=limit)
        assert wants_repacking(dataclasses.replace(three, search=search)) == wanted
    with pytest.raises(UsageError, match=r"search\.repack must be auto or off"):
        dataclasses.replace(three.search, repack="on")


def test_the_second_plan_keeps_the_side_constraints(prepared, three, first, second):
    """Without them it buys methods that they forbid."""
    mine = {o.method for o in first.allocation}
    forbidden = tuple(f"method:{key}" for key in three.methods if key not in mine)
    assert {o.method for o in second[0]} - mine
    held = dataclasses.replace(three, allocator=Knapsack(forbid=forbidden))
    plan, _ = repack_plan(prepared, held, first, share=SHARE)
    assert plan.digest != first.allocation.digest
    assert {o.method for o in plan} <= mine
    assert plan.spent <= prepared.budget.limit


def test_a_plan_that_cannot_keep_them_is_not_packed_again(prepared, three, first, tmp_path):
    held = dataclasses.replace(three, allocator=Knapsack(max_options=1))
    assert len(first.allocation) > 1
    with pytest.raises(InfeasibleBudget, match="does not keep the side constraints"):
        repack_plan(prepared, held, first, share=SHARE)
    runner = Scripted(prepared, Ledger(tmp_path / "ledger"), silent)
    found = repack(runner, Finalist("a", 0, "trial", held, first.allocation), tmp_path / "repack")
    assert found.finalist is None
    assert "side constraints" in found.reason


def test_a_first_phase_leaves_something_to_train(prepared, three, first):
    with pytest.raises(UsageError, match="at least 1 epoch"):
        FirstPhase(first.allocation, 0)
    with pytest.raises(UsageError, match="nothing is left"):
        run_trial(prepared, three, first.allocation, seed=0, folder=None, first=FirstPhase(first.allocation, 3))


@pytest.mark.slow
def test_a_repacked_winner_is_finished_exported_and_replayed(three, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "paired_interval", lambda *args: (0.1, 0.2))
    found = functools.partial(repack_plan, share=SHARE)
    monkeypatch.setattr(module, "repack_plan", found)
    monkeypatch.setattr("autopeft.pipeline.conclude.dataflow", lambda *args: None)  # seconds of tracing
    search = dataclasses.replace(three.search, repack="auto", trials=0, tries=1, seeds=1, contenders=("head_only",))
    asked = dataclasses.replace(three, search=search)
    run = RunFolder(tmp_path / "run")
    record = run_search(asked, run)
    best = next(t for t in record.trials if t.number == record.best)
    assert (best.role, record.contenders[0].role) == ("repacked", "repacked")
    assert record.contenders[0].trial == best.number
    assert best.spent <= record.budget["limit"]
    assert record.costs["repacking"] > 0
    plan = read_plan(run.root / best.plan)
    assert plan.first is not None
    assert record.exports
    assert replay(plan, tmp_path / "again").result.outcome.metrics == best.outcome.metrics
    again = run_search(asked, run)
    assert (again.best, len(again.trials), again.costs) == (record.best, len(record.trials), record.costs)
