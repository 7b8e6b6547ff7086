from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from autopeft.errors import RunLocked, StoreError
from autopeft.store.lock import RunLock

HOLD = """
import sys, time
from pathlib import Path
from autopeft.store.lock import RunLock
lock = RunLock(Path(sys.argv[1]))
lock.acquire()
{then}
print("held", flush=True)
time.sleep(600)
"""

FORK = """
import os
ready, told = os.pipe()
child = os.fork()
if child == 0:
    os.write(told, b".")
    time.sleep(600)
os.read(ready, 1)
print(child, flush=True)
"""


@contextlib.contextmanager
def holding(path: Path, then: str = "") -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock, killed at the end at the latest."""
    command = [sys.executable, "-c", HOLD.format(then=then), str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        try:
            yield other
        finally:
            other.kill()


def test_one_holder_at_a_time_who_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    with holding(path) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        lock = RunLock(path)
        with pytest.raises(RunLocked, match=rf"process {other.pid} on .* works in .*{tmp_path.name}; wait"):
            lock.acquire()
        assert not lock.held
        holder = lock.holder()
        assert holder is not None
        assert holder.alive()
        other.send_signal(signal.SIGKILL)
        other.wait()
        lock.acquire()
        assert lock.held
        lock.release()


def test_a_forked_child_does_not_keep_the_lock_of_a_killed_parent(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    with holding(path, FORK) as other:
        assert other.stdout is not None
        child = int(other.stdout.readline())
        assert other.stdout.readline() == "held\n"
        try:
            other.send_signal(signal.SIGKILL)
            other.wait()
            with RunLock(path) as lock:
                assert lock.held
        finally:
            subprocess.run(["kill", "-9", str(child)], check=True)


def test_leaving_the_block_gives_it_back_also_after_an_error(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    with pytest.raises(KeyError), RunLock(path):
        raise KeyError
    with RunLock(path) as lock:
        assert lock.held
    assert not lock.held
    lock.release()  # nothing to give back
    assert lock.holder() is None
    assert path.read_bytes() == b""


def test_two_locks_of_one_process_exclude_each_other(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    with RunLock(path) as lock:
        with pytest.raises(RunLocked):
            RunLock(path).acquire()
        with pytest.raises(StoreError, match=r"holds the lock .* already"):
            lock.acquire()
        assert lock.held


def test_a_holder_that_has_not_yet_written_its_name(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    with RunLock(path):
        path.write_text('{"host": "bo')
        with pytest.raises(RunLocked, match=r"another process works in"):
            RunLock(path).acquire()


def test_a_lock_file_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"cannot open the lock file .*: No such file"):
        RunLock(tmp_path / "none" / "run.lock").acquire()
