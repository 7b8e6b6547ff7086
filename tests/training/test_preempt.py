from __future__ import annotations

import os
import signal
import threading

import pytest

from autopeft.errors import Preempted
from autopeft.training.preempt import preemptible, requested, stop_if_requested


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_noted_and_the_handler_put_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with preemptible():
        assert not requested()
        stop_if_requested("nothing happened")
        os.kill(os.getpid(), number)
        assert requested()
        with pytest.raises(Preempted, match=rf"{number.name}; all is saved, the same command continues"):
            stop_if_requested("all is saved")
    assert signal.getsignal(number) is before
    assert not requested()
    assert Preempted.exit_code == 75


def test_another_thread_installs_nothing() -> None:
    before, seen = signal.getsignal(signal.SIGTERM), []

    def work() -> None:
        with preemptible():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]
