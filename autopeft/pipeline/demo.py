"""Limits of the run that a newcomer starts with: bundled model, bundled data, a few minutes on two busy cores."""

from __future__ import annotations

import dataclasses
from collections.abc import Set
from typing import TYPE_CHECKING

from autopeft.tasks.diffusion import Diffusion

if TYPE_CHECKING:
    from autopeft.config.study import Study

__all__ = ["DEMO_SECONDS", "with_demo_limits"]

DEMO_SECONDS = 150.0
"""Leaves a margin under three minutes for start-up, export and a busy machine."""

_DENOISER_SECONDS = 200.0
"""The same under four minutes: a sample of the bundled denoiser costs some five times one of the bundled classifier."""

_DENOISER_CONTENDERS = ("head_only", "uniform_lora", "spt_lora", "random_mix")


def with_demo_limits(study: Study, asked: Set[str]) -> Study:
    """Give the bundled task a time limit unless time, epochs or trials were asked for.

    A denoiser also gets fewer samples, two fixed noises per sample of an evaluation and four contenders, each where the
    study says nothing else, so that there is time for trials.

    Args:
        study: the resolved study.
        asked: dotted paths that were given as flags.
    """
    bundled = study.model.spec.startswith("bundled:") and study.data.spec.partition("?")[0] == "digits"
    chosen = {"search.time_limit", "train.epochs", "search.trials"} & set(asked)
    if not bundled or chosen or study.search.time_limit is not None:
        return study
    if not isinstance(study.task, Diffusion):
        return dataclasses.replace(study, search=dataclasses.replace(study.search, time_limit=DEMO_SECONDS))
    search = dataclasses.replace(study.search, time_limit=_DENOISER_SECONDS)
    if search.contenders == ("default",):
        search = dataclasses.replace(search, contenders=_DENOISER_CONTENDERS)
    data = study.data
    if data.max_samples is data.max_inner is data.val_frac is data.test_frac is None:
        data = dataclasses.replace(data, max_samples=1_000, val_frac=0.2, test_frac=0.4, max_inner=300)
    task = dataclasses.replace(study.task, draws=2) if study.task == Diffusion() else study.task
    return dataclasses.replace(study, search=search, data=data, task=task)
