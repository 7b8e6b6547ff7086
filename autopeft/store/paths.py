"""Where everything of a run lies."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

from autopeft.errors import StoreError
from autopeft.store.atomic import write_text

__all__ = ["RunFolder"]


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The folder of one run and the names of what is in it.

    Nothing is made before `create`; the writers of `autopeft.store.atomic` make subfolders when they are needed.

    Attributes:
        root: the folder.
    """

    root: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", Path(self.root))

    def __str__(self) -> str:
        return str(self.root)

    def create(self) -> RunFolder:
        """Make the folder if need be and prove that it can be written to; an existing run is left as it is.

        Raises:
            StoreError: when a file is in the way, or the folder cannot be made or written to. Folders that this call
                made are removed again.
        """
        made: list[Path] = []
        try:
            for folder in reversed((self.root, *self.root.parents)):
                if not folder.exists():
                    folder.mkdir(exist_ok=True)
                    made.append(folder)
            if not self.root.is_dir():
                raise StoreError(f"the run folder {self.root} is a file; choose another --output")
            probe = self.root / f".probe.{os.getpid()}"
            write_text(probe, "")
            probe.unlink()
        except (OSError, StoreError) as error:
            for folder in reversed(made):
                with contextlib.suppress(OSError):
                    folder.rmdir()
            if isinstance(error, StoreError) and "is a file" in str(error):
                raise
            cause = error if isinstance(error, OSError) else error.__cause__
            reason = getattr(cause, "strerror", None) or str(error)
            raise StoreError(f"the run folder {self.root} cannot be written to: {reason}") from error
        return self

    def require(self) -> RunFolder:
        """Refuse a path that holds no run.

        Raises:
            StoreError: when the folder does not exist or has no study file.
        """
        if not self.root.is_dir():
            raise StoreError(f"there is no run folder at {self.root}")
        if not self.study.is_file():
            raise StoreError(f"{self.root} is not a run folder: it has no {self.study.name}")
        return self

    @property
    def study(self) -> Path:
        """The resolved study, YAML."""
        return self.root / "study.yaml"

    @property
    def environment(self) -> Path:
        """Versions, device, threads, JSON."""
        return self.root / "environment.json"

    @property
    def splits(self) -> Path:
        """Which sample is in which split, JSON."""
        return self.root / "splits.json"

    @property
    def catalog(self) -> Path:
        """The model's catalogue, JSON."""
        return self.root / "catalog.json"

    @property
    def scores(self) -> Path:
        """Folder of the scores: JSON and safetensors."""
        return self.root / "scores"

    @property
    def graph(self) -> Path:
        """The model's dataflow graph, JSON."""
        return self.root / "graph.json"

    @property
    def plans(self) -> Path:
        """Folder of the plans, one file per trial."""
        return self.root / "plans"

    def plan(self, number: int) -> Path:
        """The plan of a trial, JSON."""
        return self.plans / f"{_numbered(number)}.json"

    @property
    def trials(self) -> Path:
        """Folder of the trials, one folder each."""
        return self.root / "trials"

    def trial(self, number: int) -> Path:
        """Folder of a trial."""
        return self.trials / _numbered(number)

    def outcome(self, number: int) -> Path:
        """What came of a trial, JSON."""
        return self.trial(number) / "outcome.json"

    def log(self, number: int) -> Path:
        """What a trial said, text."""
        return self.trial(number) / "log.txt"

    def checkpoint(self, number: int) -> Path:
        """Folder of a trial's checkpoint: adapters and head only."""
        return self.trial(number) / "checkpoint"

    @property
    def database(self) -> Path:
        """The outer loop's storage, SQLite, unless the study names another."""
        return self.root / "study.db"

    @property
    def artifacts(self) -> Path:
        """Folder of the files that trials show in the dashboard."""
        return self.root / "artifacts"

    @property
    def leaderboard(self) -> Path:
        """Every trial in a row, CSV."""
        return self.root / "leaderboard.csv"

    @property
    def report_md(self) -> Path:
        """The report, Markdown."""
        return self.root / "report.md"

    @property
    def report_html(self) -> Path:
        """The report, one HTML page."""
        return self.root / "report.html"

    @property
    def record(self) -> Path:
        """Everything a report needs, JSON."""
        return self.root / "record.json"

    @property
    def exports(self) -> Path:
        """Folder of the exports, one folder per format."""
        return self.root / "exports"

    @property
    def compressed(self) -> Path:
        """Folder of the compressed plans, one folder per choice of settings."""
        return self.root / "compressed"

    @property
    def finish(self) -> Path:
        """Folder of the final retrainings."""
        return self.root / "finish"

    @property
    def costs(self) -> Path:
        """What scoring, search and finish consumed, JSON."""
        return self.root / "costs.json"

    @property
    def lock(self) -> Path:
        """The lock file, see `autopeft.store.lock.RunLock`."""
        return self.root / "run.lock"


def _numbered(number: int) -> str:
    if number < 0:
        raise ValueError(f"a trial's number is at least 0, got {number}")
    return f"{number:04d}"
