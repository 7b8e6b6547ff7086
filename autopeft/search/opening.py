"""An Optuna study, opened or begun."""

from __future__ import annotations

from collections.abc import Mapping
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
    direction: StudyDirection,
    sampler: BaseSampler,
    pruner: BasePruner,
    *,
    identity: Mapping[str, Any],
    facts: Mapping[str, Any],
    payload: Mapping[str, Any] | None,
    metric: str,
) -> Study:
    """Open a study, or begin it; several processes may do so in the same moment.

    Args:
        url: URL of an Optuna storage.
        name: name of the study in it.
        direction: of the search, for a new study.
        sampler: the sampler.
        pruner: the pruner.
        identity: plain data that must be equal for a process to join.
        facts: attributes that the dashboard shows.
        payload: plain data for workers, for a new study.
        metric: what the value is called; empty leaves it without a name.

    Raises:
        StaleRun: when the study has another identity.
        StoreError: when the storage cannot be used.
    """
    storage = open_storage(url)
    with calm(masked_url(url)):
        study = optuna.create_study(
            storage=storage, study_name=name, direction=direction, sampler=sampler, pruner=pruner, load_if_exists=True
        )
        claim(study, identity)
        if payload is not None and read_attribute(study, "payload") is None:
            write_attribute(study, "payload", payload)
        known = study.user_attrs
        for key, value in facts.items():
            if known.get(key) != value:
                study.set_user_attr(key, value)
        if metric and study.metric_names != [metric]:
            study.set_metric_names([metric])
    return study
