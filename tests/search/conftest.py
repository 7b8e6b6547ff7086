from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy.event
from sqlalchemy.engine import Engine

from autopeft.core.goals import Goals
from autopeft.core.space import Knob, Space
from autopeft.search.optuna_study import OptunaSearcher


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk() -> Iterator[None]:
    """SQLite without a flush per transaction: these tests crash processes, not machines."""

    def relax(connection: Any, record: Any) -> None:
        if type(connection).__module__.startswith("sqlite3"):
            connection.execute("PRAGMA synchronous=OFF")

    sqlalchemy.event.listen(Engine, "connect", relax)
    yield
    sqlalchemy.event.remove(Engine, "connect", relax)


@pytest.fixture
def space() -> Space:
    return Space(
        (Knob("a", 0.0, 1.0, default=0.5), Knob("rate", 1e-4, 1.0, log=True), Knob("kind", choices=(1, 2, "x")))
    )


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'study.db'}"


@pytest.fixture
def open_(url: str, space: Space) -> Callable[..., OptunaSearcher]:
    def make(**changes: Any) -> OptunaSearcher:
        settings: dict[str, Any] = {"seed": 1, "goals": Goals(("top1",), ("maximize",)), "max_epochs": 9} | changes
        return OptunaSearcher.open(settings.pop("url", url), "study", settings.pop("space", space), **settings)

    return make


class Worker:
    """A process of `worker_process.py`."""

    def __init__(self, url: str, total: int, pause: float, *flags: str) -> None:
        script = Path(__file__).with_name("worker_process.py")
        root = str(Path(__file__).parents[2])
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        self.process = subprocess.Popen(
            [sys.executable, str(script), url, str(total), str(pause), *flags],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        self.lines: list[str] = []

    def until(self, start: str) -> None:
        """Read what it says up to a line that starts so."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.strip())
            if line.startswith(start):
                return
        raise AssertionError(f"the worker ended with {self.process.wait()} before {start!r}: {self.lines}")

    def go(self) -> None:
        """Let it open the study."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        """SIGKILL, in the middle of whatever it does."""
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        """End it if it still runs."""
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def start() -> Iterator[Callable[..., Worker]]:
    workers: list[Worker] = []

    def make(*args: Any) -> Worker:
        workers.append(Worker(*args))
        return workers[-1]

    yield make
    for worker in workers:
        worker.close()
