"""Which running trials have a process behind them."""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections.abc import Callable
from datetime import datetime
from typing import Any

from optuna.exceptions import UpdateFinishedTrialError
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from autopeft.errors import CorruptFile
from autopeft.search.history import role_of
from autopeft.store.lease import Lease

__all__ = ["Heart", "Holder", "give_up", "is_alive"]

_log = logging.getLogger(__name__)

_UNLEASED_SECONDS = 10.0
"""A trial that was taken from the queue has no lease for a moment; after so long, its process died in that moment."""

_MOST_ATTEMPTS = 3
"""A trial whose process died so often is taken to be what kills it."""

_holders: weakref.WeakValueDictionary[str, Holder] = weakref.WeakValueDictionary()


class Holder:
    """One searcher of this process and the trials it runs.

    A process may open a study, be thrown out of a trial by an error and open the study again (in a notebook): its id
    still lives, so its leases are told apart by this object. Whoever opens a study again in the same thread has left
    behind what its former searcher ran.

    Args:
        token: a text that no other holder has.
        scope: which study.
    """

    def __init__(self, token: str, scope: str) -> None:
        self.token = token
        self.scope = scope
        self.thread = threading.get_ident()
        self.numbers: set[int] = set()
        for other in list(_holders.values()):
            if (other.scope, other.thread) == (scope, self.thread):
                other.numbers.clear()
        _holders[token] = self

    def lease(self) -> dict[str, Any]:
        """A lease beating now, as a trial's attribute."""
        return {**Lease.current().to_dict(), "holder": self.token}


def is_alive(trial: FrozenTrial, now: float | None = None) -> bool:
    """Whether a running trial's process still works on it, as far as can be known from here.

    Args:
        trial: a trial in state RUNNING.
        now: seconds since 1970; the clock's when None.
    """
    now = time.time() if now is None else now
    attribute = trial.user_attrs.get("lease")
    lease, token = None, ""
    if isinstance(attribute, dict):
        token = str(attribute.get("holder", ""))
        try:
            lease = Lease.from_dict({k: v for k, v in attribute.items() if k != "holder"})
        except CorruptFile:
            lease = None
    if lease is None:
        begun = trial.datetime_start or datetime.fromtimestamp(now)
        return now - begun.timestamp() <= _UNLEASED_SECONDS
    if lease.local and lease.pid == os.getpid():
        holder = _holders.get(token)
        return holder is not None and trial.number in holder.numbers
    return lease.alive(now)


class Heart:
    """Renews leases from a thread while a trial runs, however long its epochs are.

    Args:
        beat: a method that renews the leases; the thread ends when its owner is gone. An error is logged, and beating
            goes on.
        seconds: time between two beats, well below the grace of a lease.
    """

    def __init__(self, beat: Callable[[], None], seconds: float = 30.0) -> None:
        self._beat = weakref.WeakMethod(beat)
        self._seconds = seconds
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to beat; nothing happens when it does already."""
        if self._thread is None:
            self._stop.clear()
            self._thread = threading.Thread(target=self._run, name="autopeft-heart", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Stop, and wait for a beat under way."""
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        while not self._stop.wait(self._seconds):
            beat = self._beat()
            if beat is None:
                return
            try:
                beat()
            except Exception as error:  # noqa: BLE001 - a storage that is away for a moment must not end the training
                _log.warning("a lease was not renewed: %s", error)
            del beat


def give_up(study: Study, trial: FrozenTrial) -> bool:
    """Fail a running trial, and queue it again with the same knobs.

    A trial that outlived its process three times is failed for good; baselines are not queued: whoever runs them finds
    them missing.

    Args:
        study: the study.
        trial: the trial as last read.

    Returns:
        False when another process was faster.
    """
    attempt, role = trial.user_attrs.get("attempt", 1), role_of(trial)
    again = role == "trial" and attempt < _MOST_ATTEMPTS
    reason = "its process died" if attempt == 1 else f"its process died, {attempt} times now"
    handle = Trial(study, trial._trial_id)
    try:
        handle.set_user_attr("replaced", again or role != "trial")
        handle.set_user_attr("reason", reason)
        study.tell(trial.number, state=TrialState.FAIL)
    except (UpdateFinishedTrialError, ValueError):
        return False
    if again:
        attrs = {
            "role": role,
            "retry_of": trial.number,
            "origin": trial.user_attrs.get("origin", trial.number),
            "attempt": attempt + 1,
        }
        study.enqueue_trial(trial.params, user_attrs=attrs)
    return True
