"""What every test needs: one thread, no hub, examples that are the same every time, and an honest list of skips."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, settings

# Before torch is imported anywhere: threads that fight over busy cores are slower than one.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

settings.register_profile("ci", deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
settings.load_profile("ci")

_ALLOWED_SKIPS = Path(__file__).parent / "allowed_skips.txt"
_unlisted: list[str] = []

_LONGEST = ("pipeline", "test_house.py")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One worker for every core that may be used; none where only files or single tests are asked for."""
    named = os.environ.get("PYTEST_XDIST_AUTO_NUM_WORKERS", "")
    if named.isdecimal():
        return int(named)
    if all(argument.partition("::")[0].endswith(".py") for argument in config.args):
        return 0
    return _cores()


def _cores() -> int:
    """Cores of this process: those it may run on, or fewer where a container's share of time is smaller."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, round(int(quota) / int(period))))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest: a worker is given whole files, and none should wait for the last."""
    first = tuple(Path(__file__).parent / name for name in _LONGEST)
    items.sort(key=lambda item: not any(item.path.is_relative_to(place) for place in first))


def _allowed() -> list[tuple[str, str]]:
    lines = [line for line in _ALLOWED_SKIPS.read_text().splitlines() if line.strip() and not line.startswith("#")]
    pairs = [line.partition(": ") for line in lines]
    return [(place, reason) for place, _, reason in pairs]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note every skip that the committed list does not hold."""
    if not report.skipped or hasattr(report, "wasxfail"):
        return
    text = str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else str(report.longrepr)
    reason = text.removeprefix("Skipped: ")
    if not any(report.nodeid.startswith(place) and reason.startswith(known) for place, known in _allowed()):
        _unlisted.append(f"{report.nodeid}: {reason}")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """In CI a skip that the committed list does not hold fails the run."""
    if _unlisted and os.environ.get("CI", "").lower() in ("1", "true") and exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show what `pytest_sessionfinish` failed for."""
    if _unlisted and os.environ.get("CI", "").lower() in ("1", "true"):
        terminalreporter.section(f"skips that {_ALLOWED_SKIPS.name} does not list")
        for line in _unlisted:
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def loading_process() -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """`subprocess.run` for `autopeft.export.verify`: forks of one process that has imported torch and timm already."""
    started: list[subprocess.Popen[str]] = []

    def run(command: list[str], *, cwd: Path, env: dict[str, str], **_: object) -> subprocess.CompletedProcess[str]:
        isolated, script = command[:-2], command[-2:]
        if not started:
            server = [*isolated, str(Path(__file__).with_name("loading_process.py"))]
            pipe = subprocess.PIPE
            started.append(subprocess.Popen(server, stdin=pipe, stdout=pipe, cwd=cwd.parent, env=env, text=True))
        (process,) = started
        log = cwd / "stderr.txt"
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps({"argv": script, "cwd": str(cwd), "stderr": str(log)}) + "\n")
            process.stdin.flush()
            code = int(process.stdout.readline())
        except BaseException:
            # An answer that comes too late would be taken for the next one's.
            process.kill()
            started.clear()
            raise
        return subprocess.CompletedProcess(command, code, "", log.read_text())

    yield run
    for process in started:
        process.communicate()


@pytest.fixture(scope="module")
def quick_verify(loading_process: Callable[..., subprocess.CompletedProcess[str]]) -> Iterator[None]:
    """Exports are loaded by forks of one process; `tests/export/test_verify.py` starts a new one for each."""
    from autopeft.export import verify

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            verify, "subprocess", SimpleNamespace(run=loading_process, TimeoutExpired=subprocess.TimeoutExpired)
        )
        yield


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """The URL of a fresh PostgreSQL server on loopback, run by a user who is not root; skips where there is none."""
    binaries = _postgres_binaries()
    if binaries is None:
        pytest.skip("PostgreSQL is not installed")
    if not any(_importable(name) for name in ("psycopg", "psycopg2")):
        pytest.skip("no PostgreSQL driver is installed")
    folder = Path(tempfile.mkdtemp(prefix="autopeft-postgres-"))
    as_user: list[str] = []
    if os.geteuid() == 0:
        # PostgreSQL refuses to run as root.
        if shutil.which("runuser") is None:
            pytest.skip("PostgreSQL does not run as root, and there is no runuser")
        user = "postgres" if _user_exists("postgres") else "nobody"
        shutil.chown(folder, user)
        as_user = ["runuser", "-u", user, "--"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    data, log = folder / "data", folder / "log"
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off"
    control = [*as_user, str(binaries / "pg_ctl"), "-D", str(data), "-l", str(log), "-w"]
    try:
        subprocess.run(
            [*as_user, str(binaries / "initdb"), "-D", str(data), "-A", "trust", "-U", "autopeft", "--no-sync"],
            check=True,
            capture_output=True,
            cwd=folder,
        )
        subprocess.run([*control, "-o", options, "start"], check=True, stdout=subprocess.DEVNULL, cwd=folder)
        try:
            yield f"postgresql://autopeft@127.0.0.1:{port}/postgres"
        finally:
            subprocess.run([*control, "-m", "immediate", "stop"], check=True, stdout=subprocess.DEVNULL, cwd=folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _postgres_binaries() -> Path | None:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"))
    on_path = shutil.which("pg_ctl")
    if found:
        return found[-1].parent
    return Path(on_path).resolve().parent if on_path else None


def _importable(name: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(name) is not None


def _user_exists(name: str) -> bool:
    import pwd

    try:
        pwd.getpwnam(name)
    except KeyError:
        return False
    return True
