"""An Optuna study, opened or begun."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.study import Study, StudyDirection

from autopeft.search._calm import calm
from autopeft.search.identity import claim, read_attribute, write_attribute
from autopeft.store.storage import masked_url, open_storage

__all__ = ["open_study"]


def open_study(
    url: str,
    name: str,
    directions: Sequence[StudyDirection],
    sampler: BaseSampler,
    pruner: BasePruner,
    *,
    identity: Mapping[str, Any],
    facts: Mapping[str, Any],
    payload: Mapping[str, Any] | None,
    metrics: Sequence[str],
) -> Study:
    """Open a study, or begin it; several processes may do so in the same moment.

    Args:
        url: URL of an Optuna storage.
        name: name of the study in it.
        directions: of the search, one per value, for a new study.
        sampler: the sampler.
        pruner: the pruner.
        identity: plain data that must be equal for a process to join.
        facts: attributes that the dashboard shows.
        payload: plain data for workers, for a new study.
        metrics: what the values are called.

    Raises:
        StaleRun: when the study has another identity.
        StoreError: when the storage cannot be used.
    """
    storage = open_storage(url)
    with calm(masked_url(url)):
        study = optuna.create_study(
            storage=storage,
            study_name=name,
            directions=list(directions),
            sampler=sampler,
            pruner=pruner,
            load_if_exists=True,
        )
        claim(study, identity)
        if payload is not None and read_attribute(study, "payload") is None:
            write_attribute(study, "payload", payload)
        known = study.user_attrs
        for key, value in facts.items():
            if known.get(key) != value:
                study.set_user_attr(key, value)
        if study.metric_names != list(metrics):
            study.set_metric_names(list(metrics))
    return study
