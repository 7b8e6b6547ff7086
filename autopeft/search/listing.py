"""The studies of a storage."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState

from autopeft.errors import StoreError, UsageError
from autopeft.search._calm import calm
from autopeft.search.identity import read_attribute
from autopeft.store.paths import RunFolder
from autopeft.store.storage import default_url, masked_url, open_storage

__all__ = ["list_studies", "read_payload"]


def list_studies(storage: str) -> list[dict[str, Any]]:
    """Name, best value and trials per state of every study, by name.

    Args:
        storage: a run folder, or the URL of an Optuna storage.

    Raises:
        StoreError: when there is no such run or storage.
    """
    url = storage if "://" in storage else default_url(RunFolder(Path(storage)).require().database)
    opened = open_storage(url, create=False)
    rows = []
    with calm(masked_url(url)):
        for name in sorted(optuna.get_all_study_names(opened)):
            study = optuna.load_study(study_name=name, storage=opened)
            trials = study.get_trials(deepcopy=False)
            done = [t for t in trials if t.state == TrialState.COMPLETE and t.values]
            # Of several goals the first; what breaks a limit is no result.
            values = [t.values[0] for t in done if not any(v > 0 for v in t.constraints.values())]
            pick = max if study.directions[0] == optuna.study.StudyDirection.MAXIMIZE else min
            states = Counter(t.state.name.lower() for t in trials)
            rows.append(
                {"name": name, "best": pick(values) if values else None, "trials": dict(sorted(states.items()))}
            )
    return rows


def read_payload(url: str, name: str | None = None) -> tuple[str, dict[str, Any]]:
    """What the process that began a study left for workers, and the study's name.

    Args:
        url: URL of an Optuna storage.
        name: name of the study; may be left out when the storage holds one only.

    Raises:
        StoreError: when there is no such storage or study, or autopeft did not make it.
        UsageError: when the storage holds several studies and none is named.
    """
    opened = open_storage(url, create=False)
    with calm(masked_url(url)):
        names = sorted(optuna.get_all_study_names(opened))
        if name is None and len(names) > 1:
            raise UsageError(f"the storage holds {len(names)} studies; name one with --study: {', '.join(names)}")
        if not names or (name is not None and name not in names):
            wanted = f"study {name!r}" if name is not None else "study"
            raise StoreError(f"there is no {wanted} in {masked_url(url)}; it has {', '.join(names) or 'none'}")
        found = name if name is not None else names[0]
        payload = read_attribute(optuna.load_study(study_name=found, storage=opened), "payload")
    if not isinstance(payload, dict):
        raise StoreError(f"the study {found!r} in {masked_url(url)} was not made by autopeft search")
    return found, payload
