"""Limits of the run that a newcomer starts with: bundled model, bundled data, three minutes on two busy cores."""

from __future__ import annotations

import dataclasses
from collections.abc import Set
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from autopeft.config.study import Study

__all__ = ["DEMO_SECONDS", "with_demo_limits"]

DEMO_SECONDS = 150.0
"""Leaves a margin under three minutes for start-up, export and a busy machine."""


def with_demo_limits(study: Study, asked: Set[str]) -> Study:
    """Give the bundled task a time limit unless time, epochs or trials were asked for.

    Args:
        study: the resolved study.
        asked: dotted paths that were given as flags.
    """
    bundled = study.model.spec.startswith("bundled:") and study.data.spec.partition("?")[0] == "digits"
    chosen = {"search.time_limit", "train.epochs", "search.trials"} & set(asked)
    if not bundled or chosen or study.search.time_limit is not None:
        return study
    return dataclasses.replace(study, search=dataclasses.replace(study.search, time_limit=DEMO_SECONDS))
