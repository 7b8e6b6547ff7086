"""`autopeft train`: one plan, trained again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autopeft.config.decode import study_from_dict
from autopeft.config.override import override
from autopeft.core.codec import encode
from autopeft.core.outcome import Split
from autopeft.errors import StaleRun, TrainingFailed, UsageError
from autopeft.pipeline.events import Emit, Event, silent
from autopeft.pipeline.planfile import Plan, write_plan
from autopeft.pipeline.planning import as_plan
from autopeft.pipeline.prepare import Prepared, prepare
from autopeft.pipeline.trial import TrialResult, run_trial
from autopeft.store.atomic import write_json

if TYPE_CHECKING:
    from autopeft.config.study import Study

__all__ = ["Replay", "replay"]


@dataclass(frozen=True)
class Replay:
    """A retrained plan.

    Attributes:
        result: outcome and saved adapter.
        prepared: the model and the task it was trained with.
        study: the settings it was trained with.
        plan: the plan as it was trained, written to `plan.json` in the folder.
    """

    result: TrialResult
    prepared: Prepared
    study: Study
    plan: Plan


def replay(
    plan: Plan,
    folder: Path,
    *,
    overrides: Mapping[str, Any] | None = None,
    seed: int | None = None,
    splits: tuple[Split, ...] = ("inner",),
    emit: Emit = silent,
) -> Replay:
    """Train a plan as it says, or with some of its settings changed.

    With nothing changed, on the same device with the same threads, the metric is the one the plan was made with.

    Args:
        plan: the plan.
        folder: where the adapter, `plan.json` and `outcome.json` go.
        overrides: dotted paths of the study to other values, such as `data.spec` or `train.epochs`.
        seed: the plan's when None.
        splits: what is trained on; the outer split is measured on.
        emit: what is told.

    Raises:
        StaleRun: when the model is not the one the plan was made for.
        TrainingFailed: when the training diverges.
    """
    if not plan.study:
        raise UsageError("this plan holds no study, so it cannot be trained; write it with autopeft plan")
    study = override(study_from_dict(plan.study), dict(overrides or {}))
    if study.train.threads is None:
        study = dataclasses.replace(study, train=dataclasses.replace(study.train, threads=plan.threads))
    prepared = prepare(study)
    if prepared.catalog.fingerprint != plan.fingerprint and not overrides:
        raise StaleRun(
            f"the plan was made for a model with fingerprint {plan.fingerprint}, {study.model.spec} has "
            f"{prepared.catalog.fingerprint}; it is another architecture or image size"
        )
    same_data = prepared.task.data_hash == plan.data_hash
    if plan.head and same_data and prepared.loaded.weights_hash == plan.weights_hash:
        prepared.head = plan.head
    emit(Event("stage", f"training {len(plan.allocation)} options, {plan.allocation.trainable:,} parameters"))
    result = run_trial(
        prepared,
        study,
        plan.allocation,
        seed=plan.seed if seed is None else seed,
        folder=folder,
        splits=splits,
        first=plan.first,
    )
    if result.outcome.status == "failed":
        raise TrainingFailed(result.outcome.reason)
    trained = as_plan(prepared, study, plan.allocation, plan.seed if seed is None else seed, plan.first)
    write_plan(trained, folder / "plan.json")
    write_json(folder / "outcome.json", encode(result.outcome))
    return Replay(result, prepared, study, trained)
