from __future__ import annotations

import dataclasses
import gc
import subprocess
import sys
import threading
import time
from datetime import datetime, timedelta
from typing import Any

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState, create_trial

from autopeft.search.liveness import Heart, Holder, give_up, is_alive
from autopeft.store.lease import Lease


def _trial(lease: dict[str, Any] | None, number: int = 0, age: float = 0.0) -> FrozenTrial:
    trial = create_trial(state=TrialState.RUNNING, user_attrs={} if lease is None else {"lease": lease})
    trial.number = number
    trial.datetime_start = datetime.now() - timedelta(seconds=age)
    return trial


def test_own_trials_live_as_long_as_they_are_held() -> None:
    holder = Holder("t1", "a study")
    trial = _trial(holder.lease(), 5)
    assert not is_alive(trial)
    holder.numbers.add(5)
    assert is_alive(trial)
    Holder("t2", "another study")
    assert is_alive(trial)
    other = threading.Thread(target=lambda: Holder("t3", "a study"))
    other.start()
    other.join()
    assert is_alive(trial)
    Holder("t4", "a study")  # opened again in this thread: what ran before was left behind
    assert not is_alive(trial)


def test_a_searcher_that_is_gone_holds_nothing() -> None:
    holder = Holder("t5", "a study")
    holder.numbers.add(1)
    trial = _trial(holder.lease(), 1)
    assert is_alive(trial)
    del holder
    gc.collect()
    assert not is_alive(trial)


def test_another_process_of_this_machine_is_looked_up() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    lease = dataclasses.replace(Lease.current(), pid=child.pid, started=0, beat=0.0).to_dict()
    assert is_alive(_trial(lease))
    child.kill()
    child.wait()
    assert not is_alive(_trial(lease))


def test_a_process_elsewhere_is_judged_by_its_heartbeat() -> None:
    lease = dataclasses.replace(Lease.current(), host="elsewhere", beat=1000.0).to_dict()
    assert is_alive(_trial(lease), now=1000.0 + Lease.GRACE - 1)
    assert not is_alive(_trial(lease), now=1000.0 + Lease.GRACE + 1)


@pytest.mark.parametrize("lease", [None, {"broken": 1}])
def test_without_a_lease_a_moment_is_granted(lease: dict[str, Any] | None) -> None:
    assert is_alive(_trial(lease, age=2.0))
    assert not is_alive(_trial(lease, age=60.0))


def _study() -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna.create_study()


def _run(study: optuna.Study, **attrs: Any) -> FrozenTrial:
    dist = {"x": optuna.distributions.FloatDistribution(0, 1)}
    study.add_trial(create_trial(state=TrialState.RUNNING, params={"x": 0.25}, distributions=dist, user_attrs=attrs))
    return study.trials[-1]


def test_given_up_trials_are_queued_with_the_same_knobs() -> None:
    study = _study()
    assert give_up(study, _run(study, role="trial", name="n"))
    lost, queued = study.trials
    assert lost.state == TrialState.FAIL
    assert lost.user_attrs["replaced"] is True
    assert lost.user_attrs["reason"] == "its process died"
    assert queued.state == TrialState.WAITING
    assert queued.user_attrs == {"role": "trial", "retry_of": 0, "origin": 0, "attempt": 2}
    assert study.ask().suggest_float("x", 0, 1) == 0.25


def test_the_faster_of_two_wins() -> None:
    study = _study()
    trial = _run(study, role="trial")
    assert give_up(study, trial)
    assert not give_up(study, trial)
    assert len(study.trials) == 2


def test_the_third_death_is_the_last() -> None:
    study = _study()
    assert give_up(study, _run(study, role="trial", attempt=2, origin=7))
    assert study.trials[-1].user_attrs["origin"] == 7
    assert study.trials[-1].user_attrs["attempt"] == 3
    assert give_up(study, _run(study, role="trial", attempt=3))
    last = study.trials[-1]
    assert (last.state, last.user_attrs["replaced"]) == (TrialState.FAIL, False)
    assert last.user_attrs["reason"] == "its process died, 3 times now"


def test_baselines_are_not_queued() -> None:
    study = _study()
    assert give_up(study, _run(study, role="baseline"))
    assert [t.state for t in study.trials] == [TrialState.FAIL]
    assert study.trials[0].user_attrs["replaced"] is True


class Owner:
    def __init__(self, error: Exception | None = None) -> None:
        self.beats = 0
        self.error = error

    def beat(self) -> None:
        self.beats += 1
        if self.error is not None:
            raise self.error


def _wait(condition: Any) -> None:
    end = time.monotonic() + 10
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    assert condition()


def test_the_heart_beats_until_it_is_stopped() -> None:
    owner = Owner()
    heart = Heart(owner.beat, seconds=0.005)
    heart.start()
    heart.start()
    _wait(lambda: owner.beats >= 3)
    heart.stop()
    heart.stop()
    count = owner.beats
    time.sleep(0.03)
    assert owner.beats == count
    heart.start()
    _wait(lambda: owner.beats > count)
    heart.stop()


def test_the_heart_survives_errors(caplog: pytest.LogCaptureFixture) -> None:
    owner = Owner(OSError("away"))
    heart = Heart(owner.beat, seconds=0.005)
    heart.start()
    _wait(lambda: owner.beats >= 3)
    heart.stop()
    assert "a lease was not renewed: away" in caplog.text


def test_the_heart_ends_with_its_owner() -> None:
    owner = Owner()
    heart = Heart(owner.beat, seconds=0.005)
    heart.start()
    del owner
    gc.collect()
    thread = heart._thread
    assert thread is not None
    thread.join(10)
    assert not thread.is_alive()
