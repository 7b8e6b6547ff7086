from __future__ import annotations

import gc
import logging
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from autopeft.core.goals import Goals
from autopeft.core.outcome import Outcome
from autopeft.core.record import Trial
from autopeft.core.space import Knob, Space
from autopeft.errors import StaleRun, StoreError, UnknownKey, UsageError
from autopeft.search.optuna_study import OptunaSearcher, Suggested
from autopeft.search.random import Random
from autopeft.search.tpe import TPE

Open = Callable[..., OptunaSearcher]


def _done(value: float = 0.5) -> Outcome:
    return Outcome("done", {"top1": value}, ((1, value),))


def _trial(number: int, name: str, value: float = 0.5, **changes: Any) -> Trial:
    facts = {"role": "baseline", "knobs": {"a": 0.25, "rate": 0.5, "kind": "x"}, "rewards": (value,)} | changes
    outcome = facts.pop("outcome", _done(value))
    return Trial(number, name, digest="d", spent=10, mix={"lora": 10}, outcome=outcome, **facts)


def _frozen(searcher: OptunaSearcher, url: str) -> list[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return optuna.load_study(study_name=searcher.name, storage=url).trials


def test_a_trial_from_asking_to_telling(open_: Open, url: str) -> None:
    searcher = open_(facts={"model": "vit"})
    asked = searcher.ask()
    assert asked == Suggested(0, asked.values, 0, 1)
    assert searcher.remaining(3) == 2
    assert searcher.states() == {"running": 1, "complete": 0, "pruned": 0, "failed": 0, "waiting": 0}
    assert not searcher.report(0, 1, 0.25)
    assert not searcher.report(0, 1, 0.25)  # again, after a resumed epoch
    searcher.describe(_trial(0, "trial 0", role="trial", knobs=dict(asked.values)))
    searcher.tell(0, _done(), (0.5,))
    assert (searcher.count(), searcher.remaining(3), searcher.remaining(1), searcher.remaining(0)) == (1, 2, 0, 0)
    found = searcher.finished()
    assert [(t.number, t.name, t.rewards, t.knobs) for t in found] == [(0, "trial 0", (0.5,), asked.values)]
    stored = _frozen(searcher, url)[0]
    assert stored.value == 0.5
    assert stored.intermediate_values == {1: 0.25}
    assert stored.user_attrs["mix"] == "lora 10"
    assert optuna.load_study(study_name="study", storage=url).user_attrs["model"] == "vit"


def test_telling_what_cannot_be(open_: Open) -> None:
    searcher = open_()
    number = searcher.ask().number
    with pytest.raises(UsageError, match="is done and has 0 rewards"):
        searcher.tell(number, _done())
    with pytest.raises(UsageError, match="is pruned and has 1 rewards"):
        searcher.tell(number, Outcome("pruned"), (0.5,))
    with pytest.raises(UsageError, match="must be finite"):
        searcher.tell(number, _done(), (math.nan,))
    with pytest.raises(UsageError, match="trial 9 is not one that this searcher asked"):
        searcher.tell(9, _done(), (0.5,))
    searcher.tell(number, _done(), (0.5,))
    with pytest.raises(UsageError, match="trial 0 is not one"):
        searcher.report(number, 1, 0.5)


def test_fixed_knobs_and_roles(open_: Open) -> None:
    searcher = open_()
    assert searcher.ask({"a": 0.125}).values["a"] == 0.125
    baseline = searcher.ask({"a": 0.125}, role="baseline")
    assert baseline.values == {"a": 0.125, "rate": pytest.approx(1e-2), "kind": 1}
    assert searcher.ask(role="default").values["a"] == 0.5
    with pytest.raises(UnknownKey):
        searcher.ask({"b": 1.0})
    with pytest.raises(UsageError):
        searcher.ask({"a": 2.0})
    assert searcher.remaining(5) == 4  # baselines do not count
    assert len(searcher.states()) == 5


def test_baselines_are_added_with_all_knobs_and_never_count(open_: Open, url: str) -> None:
    searcher = open_()
    number = searcher.next_number()
    assert searcher.next_number() == number + 1  # reserved: nobody else is given it
    assert searcher.add_finished(_trial(number, "head only", 0.4)) == number
    assert searcher.add_finished(_trial(77, "spt", 0.6)) == 2
    failed = Outcome("failed", reason="the loss became nan")
    searcher.add_finished(_trial(number + 1, "uniform lora", outcome=failed, rewards=()))
    assert searcher.count() == 0
    assert [(t.number, t.name, t.role) for t in searcher.finished()] == [
        (0, "head only", "baseline"),
        (1, "uniform lora", "baseline"),
        (2, "spt", "baseline"),
    ]
    stored = _frozen(searcher, url)
    assert [t.state for t in stored] == [TrialState.COMPLETE, TrialState.FAIL, TrialState.COMPLETE]
    assert all(t.params == {"a": 0.25, "rate": 0.5, "kind": "x"} for t in stored)
    assert stored[0].intermediate_values == {1: 0.4}
    best = searcher.best()
    assert best is not None
    assert best.name == "spt"
    assert searcher.best("trial", "default") is None


def test_best_follows_the_goal_and_ties_go_to_the_earlier(open_: Open) -> None:
    searcher = open_(goals=Goals(("top1",), ("minimize",)))
    for value in (0.5, 0.25, 0.25, 0.75):
        searcher.tell(searcher.ask().number, _done(value), (value,))
    best = searcher.best("trial")
    assert best is not None
    assert best.number == 1


def test_rungs_stop_trials_and_nothing_stops_baselines(open_: Open) -> None:
    searcher = open_(max_epochs=3, eta=3)
    stopped = []
    for value in (0.9, 0.8, 0.7, 0.6, 0.5, 0.4):
        number = searcher.ask().number
        stopped.append(searcher.report(number, 1, value))
        searcher.tell(number, Outcome("pruned") if stopped[-1] else _done(), () if stopped[-1] else (value,))
    # Shares of the brackets are 3 : 2, so that trials 1 and 3 are safe; 2, 4, 5 are judged against 2, 4, 5 others.
    assert stopped == [False, False, True, False, True, True]
    assert searcher.count() == 6
    baseline = searcher.ask(role="baseline").number
    assert not searcher.report(baseline, 1, 0.0)
    assert not searcher.report(baseline, 2, math.nan)
    assert searcher.report(searcher.ask().number, 1, math.nan)


def test_a_dead_process_is_reaped_once(open_: Open, url: str) -> None:
    searcher = open_()
    searcher.tell(searcher.ask().number, _done(), (0.5,))
    lost = searcher.ask()
    searcher.report(lost.number, 1, 0.5)
    other = open_()  # in the same thread: the first searcher's trial was left behind
    assert other.others_running()
    assert other.reap() == (1,)
    assert other.reap() == ()
    assert not other.others_running()
    assert other.remaining(3) == 2
    again = other.ask()
    assert again == Suggested(2, lost.values, origin=1, attempt=2)
    assert [t.number for t in other.finished()] == [0]
    with caplog_of("autopeft.search.optuna_study") as messages:
        searcher.tell(lost.number, _done(0.9), (0.9,))
    assert "trial 1 was given up by another process" in messages[0]
    other.tell(again.number, _done(), (0.5,))
    # The record numbers by place: the second attempt stands where the first one stood.
    assert [t.number for t in other.finished()] == [0, 1]
    assert other.place(again.number) == other.place(lost.number) == 1
    assert [t.state.name for t in _frozen(other, url)] == ["COMPLETE", "FAIL", "COMPLETE"]


class caplog_of:  # noqa: N801 - used like a function
    def __init__(self, name: str) -> None:
        self.logger, self.messages = logging.getLogger(name), list[str]()

    def __enter__(self) -> list[str]:
        self.handler = logging.Handler()
        self.handler.emit = lambda record: self.messages.append(record.getMessage())  # type: ignore[method-assign]
        self.logger.addHandler(self.handler)
        return self.messages

    def __exit__(self, *args: object) -> None:
        self.logger.removeHandler(self.handler)


def test_reporting_a_reaped_trial_stops_it(open_: Open) -> None:
    searcher = open_()
    number = searcher.ask().number
    open_().reap()
    assert searcher.report(number, 1, 0.5)
    searcher.describe(_trial(number, "late"))
    searcher.beat(number)


def test_abandoned_trials_are_asked_again(open_: Open) -> None:
    searcher = open_()
    first = searcher.ask()
    searcher.abandon(first.number)
    assert searcher.states()["waiting"] == 1
    assert searcher.remaining(1) == 1
    again = searcher.ask()
    assert (again.values, again.origin, again.attempt) == (first.values, first.number, 2)
    searcher.abandon(again.number)
    third = searcher.ask()
    assert (third.values, third.origin, third.attempt) == (first.values, first.number, 3)
    searcher.abandon(third.number)
    assert searcher.states()["failed"] == 1
    assert searcher.count() == 1
    with pytest.raises(UsageError):
        searcher.abandon(third.number)


def test_a_fixed_ask_does_not_take_what_waits(open_: Open) -> None:
    searcher = open_()
    searcher.abandon(searcher.ask().number)
    assert searcher.ask({"a": 0.75}).attempt == 1
    assert searcher.ask(role="baseline").attempt == 1
    assert searcher.ask().attempt == 2


def test_equal_trials_are_trained_once(open_: Open, url: str) -> None:
    searcher = open_()
    one, two = searcher.ask().number, searcher.ask().number
    assert searcher.claim_key(one, "k") is None
    assert searcher.claim_key(two, "k") is None  # both run: nobody knows yet
    searcher.tell(one, _done(), (0.5,))
    searcher.tell(two, _done(), (0.5,))
    three = searcher.ask().number
    twin = searcher.claim_key(three, "k")
    assert twin is not None
    assert twin.number == one
    searcher.tell(three, twin.outcome, twin.rewards)
    found = searcher.find("k")
    assert found is not None
    assert found.number == one
    assert searcher.find("other") is None
    stored = _frozen(searcher, url)
    assert [t.user_attrs.get("key") for t in stored] == ["k", "", None]
    assert [t.user_attrs.get("same_as") for t in stored] == [None, one, one]


@pytest.mark.parametrize(
    ("change", "path"),
    [
        ({"identity": {"data": "theirs"}}, "data was 'ours' and is 'theirs' now"),
        ({"max_epochs": 5}, r"search\.rungs\.max_epochs was 9 and is 5 now"),
        ({"seed": 2}, r"search\.seed was 1 and is 2"),
        ({"goals": Goals(("top1",), ("minimize",))}, r"search\.goals\.directions was \['maximize'\]"),
        ({"sampler": TPE(5)}, r"search\.sampler\.startup was 10 and is 5 now"),
        ({"sampler": Random()}, r"search\.sampler\.startup was 10 and is None now; search\.sampler\.type was 'TPE'"),
        ({"space": Space((Knob("b", 0.0, 1.0),))}, r"search\.space\.knobs"),
    ],
)
def test_another_study_may_not_join(open_: Open, change: Mapping[str, Any], path: str) -> None:
    open_(identity={"data": "ours"})
    with pytest.raises(StaleRun, match=path):
        open_(**({"identity": {"data": "ours"}} | dict(change)))


def test_a_goal_is_one_of_two(open_: Open) -> None:
    with pytest.raises(UsageError, match="'up'"):
        open_(goals=Goals(("top1",), ("up",)))


def test_a_storage_that_goes_away_is_a_store_error(open_: Open, url: str) -> None:
    searcher = open_()
    searcher.ask()
    path = url.removeprefix("sqlite:///")
    import sqlite3

    connection = sqlite3.connect(path)
    connection.executescript("PRAGMA writable_schema=1; DROP TABLE trial_user_attributes; DROP TABLE trials;")
    connection.close()
    with pytest.raises(StoreError, match=r"the storage sqlite:///.*study\.db cannot be used: .*no such table"):
        searcher.ask()


def test_optunas_settings_are_left_as_they_were(open_: Open, capfd: pytest.CaptureFixture[str]) -> None:
    optuna.logging.set_verbosity(optuna.logging.INFO)
    filters = list(warnings.filters)
    searcher = open_()
    searcher.tell(searcher.ask().number, _done(), (0.5,))
    assert optuna.logging.get_verbosity() == optuna.logging.INFO
    assert warnings.filters == filters
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_the_note_reaches_the_dashboard(open_: Open, url: str, caplog: pytest.LogCaptureFixture) -> None:
    searcher = open_()
    searcher.note("**best: trial 3**")
    study = optuna.load_study(study_name="study", storage=url)
    assert "**best: trial 3**" in str(study._storage.get_study_system_attrs(study._study_id))
    assert not caplog.records


def test_a_note_that_fails_is_logged(
    open_: Open, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(study: object, text: str) -> None:
        raise RuntimeError("no dashboard today")

    searcher = open_()
    monkeypatch.setattr("optuna_dashboard.save_note", fail)
    searcher.note("x")
    assert "no dashboard today" in caplog.text


def test_leases_are_renewed(open_: Open, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    searcher = open_()
    number = searcher.ask().number
    before = _frozen(searcher, url)[number].user_attrs["lease"]["beat"]
    searcher.beat(number)
    assert _frozen(searcher, url)[number].user_attrs["lease"]["beat"] == before  # a moment ago
    monkeypatch.setattr("autopeft.search.custody._BEAT_SECONDS", 0.0)
    searcher.beat(number)
    assert _frozen(searcher, url)[number].user_attrs["lease"]["beat"] > before
    searcher.tell(number, _done(), (0.5,))
    gc.collect()
