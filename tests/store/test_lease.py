from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from autopeft.errors import CorruptFile
from autopeft.store import lease as module
from autopeft.store.lease import Lease

SLEEPER = [sys.executable, "-S", "-c", "import time; time.sleep(600)"]


def lease_of(pid: int) -> Lease:
    started = module._started(pid)
    assert started is not None
    return dataclasses.replace(Lease.current(), pid=pid, started=started)


def test_this_process_lives() -> None:
    lease = Lease.current()
    assert lease.pid == os.getpid()
    assert lease.started > 0
    assert lease.local
    assert lease.alive()
    assert lease.alive(now=lease.beat + 10**9), "a process that can be looked up needs no heartbeat"


def test_a_killed_process_is_dead_as_a_zombie_and_after() -> None:
    with subprocess.Popen(SLEEPER) as child:
        lease = lease_of(child.pid)
        assert lease.alive()
        child.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead, not yet collected
        assert not lease.alive()
        child.wait()
        assert not lease.alive()


def test_a_recycled_id_is_not_mistaken() -> None:
    lease = Lease.current()
    earlier = dataclasses.replace(lease, started=lease.started - 1)
    assert not earlier.alive(), "the id exists, but belongs to a process that started later"


def test_a_name_with_parentheses_does_not_confuse_the_start_time(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    proc = tmp_path_factory.mktemp("proc")
    (proc / "77").mkdir()
    # fields 3 to 22 of proc(5): the state, then 18 numbers, then the start time
    (proc / "77" / "stat").write_text("77 (a) Z (b c) S " + " ".join(str(i) for i in range(18)) + " 4242 0\n")
    monkeypatch.setattr(module, "_PROC", proc)
    assert module._started(77) == 4242
    (proc / "77" / "stat").write_text("77 (x) Z " + " ".join(str(i) for i in range(18)) + " 4242 0\n")
    assert module._started(77) is None


@pytest.mark.parametrize("change", [{"host": "elsewhere"}, {"machine": "another boot"}])
def test_a_process_elsewhere_is_judged_by_its_heartbeat(change: dict[str, str]) -> None:
    lease = dataclasses.replace(Lease.current(now=1000.0), **change)
    assert not lease.local
    assert lease.alive(now=1000.0 + Lease.GRACE)
    assert not lease.alive(now=1001.0 + Lease.GRACE)
    assert lease.alive(now=1010.0, grace=10.0)
    assert not lease.alive(now=1010.5, grace=10.0)
    assert lease.renewed(now=2000.0).alive(now=2001.0)
    assert dataclasses.replace(lease.renewed(now=2000.0), beat=lease.beat) == lease


def test_where_the_system_tells_no_start_time_the_id_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_started", lambda pid: None)
    lease = Lease.current()
    assert lease.started == 0
    assert lease.alive()


def test_a_foreign_process_exists_although_it_may_not_be_signalled(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(pid: int, sig: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", forbidden)
    assert module._exists(1)


def test_a_lease_survives_json_and_the_clock_is_the_default() -> None:
    before = time.time()
    lease = Lease.current()
    assert before <= lease.beat <= time.time()
    assert Lease.from_dict(json.loads(json.dumps(lease.to_dict()))) == lease


@pytest.mark.parametrize("data", [{}, {"pid": 3}, {"schema": "autopeft.lease/9"}])
def test_what_is_no_lease_is_refused(data: dict[str, object]) -> None:
    with pytest.raises(CorruptFile, match="trial 3"):
        Lease.from_dict(data, "trial 3")


def test_what_a_person_reads() -> None:
    assert str(dataclasses.replace(Lease.current(), host="box", pid=7)).startswith("process 7 on box (last seen ")
