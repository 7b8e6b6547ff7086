"""Plans made without training: from scores, or from a file released with SPT."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from autopeft.allocation.from_spt import SptFile, read_spt, spt_allocation
from autopeft.config.decode import study_to_dict
from autopeft.core.allocation import Allocation
from autopeft.errors import UsageError
from autopeft.pipeline.events import Emit, Event, silent
from autopeft.pipeline.packing import next_best, packing_facts
from autopeft.pipeline.phases import FirstPhase
from autopeft.pipeline.plan import make_plan
from autopeft.pipeline.planfile import Plan
from autopeft.pipeline.prepare import Prepared, prepare

if TYPE_CHECKING:
    from autopeft.config.study import Study

__all__ = ["as_plan", "plan_from_spt", "plan_study"]

_STRUCTURED = ("lora", "adapter")


def as_plan(
    prepared: Prepared,
    study: Study,
    allocation: Allocation,
    seed: int | None = None,
    first: FirstPhase | None = None,
) -> Plan:
    """An allocation with everything that is needed to train it again."""
    return Plan(
        allocation,
        prepared.loaded.name,
        prepared.catalog.fingerprint,
        study_to_dict(study),
        study.seed if seed is None else seed,
        prepared.threads,
        prepared.loaded.weights_hash,
        prepared.task.data_hash,
        prepared.head,
        packing_facts(allocation),
        first,
    )


def plan_study(study: Study, emit: Emit = silent) -> Plan:
    """Score the model on the data and spend the budget; nothing is trained but the ridge probe, nothing is written."""
    prepared = prepare(study)
    sizes = ", ".join(f"{name} {n:,}" for name, n in prepared.task.sizes.items())
    emit(Event("stage", f"data {study.data.spec}: {len(prepared.task.classes)} classes, {sizes}"))
    emit(Event("stage", f"model {prepared.loaded.name}: {prepared.catalog.n_base:,} base parameters"))
    emit(Event("stage", f"budget {prepared.budget}; the head's {prepared.catalog.n_head:,} are not counted"))
    allocation = make_plan(prepared, study)
    seconds = ", ".join(f"{name} {value:.1f} s" for name, value in prepared.seconds.items())
    emit(Event("result", f"plan: {len(allocation)} options for {allocation.spent:,} ({seconds})"))
    rival = next_best(prepared, study, allocation)
    return dataclasses.replace(as_plan(prepared, study, allocation), packing=packing_facts(allocation, rival))


def _spt_allocation(file: SptFile, prepared: Prepared, study: Study) -> Allocation:
    """The file's plan with LoRA or adapter modules, whichever the file's own count fits: it does not say which."""
    found = [spt_allocation(file, prepared.catalog, study.methods, key) for key in _STRUCTURED if key in study.methods]
    if not found:
        raise UsageError(f"an SPT file needs one of the methods {', '.join(_STRUCTURED)}, and the study has neither")
    return min(found, key=lambda allocation: abs(allocation.trainable - file.params))


def plan_from_spt(study: Study, path: Path, emit: Emit = silent) -> Plan:
    """The allocation that SPT's authors released in a file, as a plan for the study's model and data.

    Raises:
        CorruptFile: when the file is not such an allocation; nothing in it is ever executed.
        UsageError: when it does not fit the model.
    """
    file = read_spt(path)
    prepared = prepare(dataclasses.replace(study, head_warmup=False))
    allocation = _spt_allocation(file, prepared, study)
    emit(Event("result", f"{path.name}: {len(allocation)} options for {allocation.trainable:,} parameters"))
    if allocation.trainable != file.params:
        text = f"the file counts {file.params:,} parameters, its modules as built here have {allocation.trainable:,}"
        emit(Event("warning", text))
    plan = as_plan(prepared, study, allocation)
    return dataclasses.replace(plan, head={})
