"""Two workers on one PostgreSQL: Debian's server, started on loopback, not as root."""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from autopeft.search.history import is_replaced, role_of
from autopeft.store.storage import open_storage

TOTAL = 8


def _binaries() -> Path | None:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda p: int(p.parts[-3].split(".")[0]))
    on_path = shutil.which("initdb")
    return found[-1].parent if found else Path(on_path).parent if on_path else None


def _user() -> str | None:
    """Whom to become: PostgreSQL refuses to run as root."""
    if os.geteuid() != 0:
        return None
    names = {entry.pw_name for entry in pwd.getpwall()}
    return next(name for name in ("postgres", "nobody") if name in names)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    binaries = _binaries()
    if binaries is None:
        pytest.skip("PostgreSQL is not installed")
    if all(importlib.util.find_spec(name) is None for name in ("psycopg", "psycopg2")):
        pytest.skip("no driver of PostgreSQL is installed")
    user = _user()
    # Not tmp_path: its parents are closed to every user but the one who runs the tests.
    folder = Path(tempfile.mkdtemp(prefix="autopeft-pg-"))
    data, port = folder / "data", _free_port()
    as_user = ["setpriv", f"--reuid={user}", f"--regid={pwd.getpwnam(user).pw_gid}", "--clear-groups"] if user else []

    def run(*command: str) -> None:
        subprocess.run([*as_user, *command], check=True, cwd=folder, stdout=subprocess.DEVNULL, timeout=120)

    try:
        if user:
            shutil.chown(folder, user)
        run(str(binaries / "initdb"), "-D", str(data), "-U", "autopeft", "-A", "trust", "--no-sync")
        options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off"
        run(str(binaries / "pg_ctl"), "-D", str(data), "-o", options, "-l", str(folder / "log"), "-w", "start")
        try:
            yield f"postgresql://autopeft@127.0.0.1:{port}/postgres"
        finally:
            run(str(binaries / "pg_ctl"), "-D", str(data), "-m", "immediate", "-w", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_two_workers_begin_together_and_one_is_killed(server: str, start: Callable[..., Any]) -> None:
    """Both make tables and study in the same moment; what the killed one ran is run again by the other."""
    workers = [start(server, TOTAL, 0.02, "--hang=1:0"), start(server, TOTAL, 0.02)]
    for worker in workers:
        worker.until("ready")
    for worker in workers:
        worker.go()
    victim, survivor = workers
    victim.until("hangs")
    lost = int(victim.lines[-2].split()[1])
    victim.kill()
    survivor.until(f"finished {TOTAL}")

    storage = open_storage(server)
    trials = optuna.load_study(study_name="kill", storage=storage).trials
    assert [t.number for t in trials] == list(range(len(trials)))
    kept = [t for t in trials if role_of(t) == "trial" and not is_replaced(t)]
    counts = Counter(t.state for t in kept)
    assert counts[TrialState.COMPLETE] + counts[TrialState.PRUNED] == TOTAL == len(kept)
    assert trials[lost].state == TrialState.FAIL
    retry = next(t for t in trials if t.user_attrs.get("retry_of") == lost)
    assert retry.params.items() >= trials[lost].params.items()
    pids = {t.user_attrs["lease"]["pid"] for t in kept}
    assert pids == {worker.process.pid for worker in workers}
    keys = [t.user_attrs["key"] for t in kept if t.state == TrialState.COMPLETE]
    assert len(set(keys)) == len(keys)
    storage.remove_session()
    storage.engine.dispose()
