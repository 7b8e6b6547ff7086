"""`autopeft worker`: trials of a study that another process started."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

from autopeft.config.decode import study_from_dict
from autopeft.core.codec import decode
from autopeft.errors import StoreError, UsageError
from autopeft.pipeline.effort import Effort
from autopeft.pipeline.events import Emit, Event, silent
from autopeft.pipeline.ledger import Ledger
from autopeft.pipeline.prepare import prepare
from autopeft.pipeline.runner import Runner
from autopeft.pipeline.trials import TrialLoop, open_searcher
from autopeft.search.listing import read_payload
from autopeft.store.paths import RunFolder
from autopeft.store.storage import default_url
from autopeft.training.preempt import preemptible

__all__ = ["run_worker"]


def run_worker(
    run: RunFolder | None,
    *,
    storage: str | None = None,
    study_name: str | None = None,
    max_trials: int | None = None,
    device: str | None = None,
    emit: Emit = silent,
) -> int:
    """Join a study and run trials until its total is reached.

    The settings come from the study itself. The worker loads the model and the data under the names given there and
    refuses to run when their hashes differ.

    Args:
        run: the run folder, when this machine sees it.
        storage: Optuna storage URL; the run folder's SQLite when None.
        study_name: name of the study; the storage's only one when None.
        max_trials: stop after so many trials of this worker.
        device: another device than the study's.
        emit: what is told.

    Returns:
        Trials that this worker ran.

    Raises:
        StoreError: when there is no such storage or study.
        StaleRun: when model or data are not the study's.
    """
    if run is None and storage is None:
        raise UsageError("a worker needs a run folder or a storage URL")
    url = storage or default_url(run.require().database if run is not None else Path())
    name, payload = read_payload(url, study_name)
    study = study_from_dict(payload["study"])
    if device is not None:
        study = dataclasses.replace(study, device=device)
    effort = decode(Effort, payload["effort"], "the study's effort")
    folder = run or RunFolder(Path(payload["run"]))
    if not folder.root.is_dir():
        # Another machine: plans and adapters of this worker's trials stay here, outcomes go to the storage.
        folder = RunFolder(Path(tempfile.mkdtemp(prefix="autopeft-worker-")))
        emit(Event("warning", f"the run folder {payload['run']} is not on this machine; trials are kept in {folder}"))
    if not folder.root.is_dir():
        raise StoreError(f"the run folder {folder} cannot be reached")
    with preemptible():
        prepared = prepare(study, folder.root)
        searcher = open_searcher(prepared, study, folder, effort, storage=url, name=name)
        runner = Runner(prepared, Ledger(folder.root / "ledger"), emit)
        return TrialLoop(runner, study, searcher, effort, folder).until(study.search.trials, most=max_trials)
