"""A trained plan into the formats that leave the house, each reloaded and compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from autopeft.config.decode import study_from_dict
from autopeft.config.registries import EXPORTERS
from autopeft.core.codec import decode
from autopeft.core.record import Record
from autopeft.errors import CorruptFile, ExportError, StoreError, UsageError
from autopeft.export.verify import verify_all
from autopeft.models.calling import output_on
from autopeft.pipeline.events import Emit, Event, silent
from autopeft.pipeline.facts import budget_facts, data_facts, model_facts
from autopeft.pipeline.planfile import Plan, read_plan, write_plan
from autopeft.pipeline.planning import as_plan
from autopeft.pipeline.prepare import Prepared, prepare
from autopeft.pipeline.restore import restore
from autopeft.store.atomic import read_json

if TYPE_CHECKING:
    from torch import Tensor

    from autopeft.core.contracts import Inserted

__all__ = [
    "DEFAULT_KINDS",
    "deliver",
    "export_folder",
    "record_of",
    "sample_images",
    "trained_plan",
    "with_exports",
]

DEFAULT_KINDS = ("timm", "peft", "delta", "native")
"""What a search exports where the plan can be represented."""

_UNTRAINED = ("peft-init",)
"""Formats of the plan before training: adapters at their start, the warmed-up head."""

_PIPELINES = ("diffusers",)
"""Formats that copy the other parts of the pipeline that the model was taken from."""

_IMAGES = 8


def deliver(
    prepared: Prepared,
    plan: Plan,
    adapter: Path,
    record: Record,
    folder: Path,
    kinds: Sequence[str] = DEFAULT_KINDS,
    *,
    required: bool = False,
    emit: Emit = silent,
) -> dict[str, Path]:
    """Export a trained plan.

    Args:
        prepared: the model and the task.
        plan: the plan, whose study holds methods and settings.
        adapter: the trained adapter and head.
        record: provenance for the model cards.
        folder: each format gets a folder of its own below.
        kinds: formats.
        required: raise instead of leaving out a format that cannot represent the plan.
        emit: what is told.

    Returns:
        Format to folder, for the formats that were written and gave the same logits in a fresh process.

    Raises:
        ExportError: when a required format cannot represent the plan, or a reloaded export gives other logits.
    """
    unknown = [kind for kind in kinds if kind not in EXPORTERS]
    if unknown:
        raise UsageError(f"there is no export format {unknown[0]!r}; known: {', '.join(EXPORTERS)}")
    study = study_from_dict(plan.study)
    images = sample_images(prepared)
    trained = [kind for kind in kinds if kind not in _UNTRAINED]
    written: dict[str, Path] = {}
    for group, file in ((trained, adapter), ([k for k in kinds if k in _UNTRAINED], None)):
        if not group:
            continue
        with prepared.study.backend.insert(
            prepared.model, prepared.catalog, plan.allocation, study.methods, seed=plan.seed, head=prepared.head
        ) as inserted:
            if file is not None:
                restore(inserted, file)
            found = _write(inserted, record, folder, group, required, emit, prepared)
            if "native" in found:
                write_plan(as_plan(prepared, study, plan.allocation, plan.seed), found["native"] / "plan.json")
            logits = _logits(inserted, images.to(prepared.device))
            differences = verify_all(found, images, logits, inserted=inserted, record=record)
        for kind, target in found.items():
            apart = differences.get(kind)
            note = "written" if apart is None else f"same logits in a fresh process, difference {apart:.1e}"
            emit(Event("result", f"export {kind}: {target} ({note})"))
        written |= found
    return {kind: written[kind] for kind in kinds if kind in written}


def _placed(record: Record, prepared: Prepared) -> Record:
    """The record with the folder of the pipeline that the model was taken from, which is no part of it on disk."""
    facts, config = prepared.loaded.data_config.get("diffusion"), record.model.get("data_config")
    if not isinstance(facts, Mapping) or not isinstance(config, Mapping):
        return record
    known = {**(config.get("diffusion") or {}), "folder": facts["folder"]}
    return dataclasses.replace(record, model={**record.model, "data_config": {**config, "diffusion": known}})


def _write(
    inserted: Inserted,
    record: Record,
    folder: Path,
    kinds: Sequence[str],
    required: bool,
    emit: Emit,
    prepared: Prepared,
) -> dict[str, Path]:
    """Write the formats that can represent the plan."""
    written: dict[str, Path] = {}
    for kind in kinds:
        exporter = EXPORTERS[kind]()
        reason = exporter.supports(inserted)
        if reason and required:
            raise ExportError(f"the plan cannot be exported as {kind}: {reason}")
        if reason:
            emit(Event("result", f"export {kind}: left out, {reason}"))
            continue
        exporter.export(inserted, _placed(record, prepared) if kind in _PIPELINES else record, folder / kind)
        written[kind] = folder / kind
    return written


def _logits(inserted: Inserted, images: Tensor) -> Tensor:
    """What the model gives, in full float32 precision also on devices that round convolutions by default."""
    inserted.train_mode(False)
    with torch.no_grad(), torch.backends.cudnn.flags(allow_tf32=False):
        return output_on(inserted.model, images).float().cpu()


def export_folder(
    source: Path, kinds: Sequence[str], output: Path | None, *, trial: int | None = None, emit: Emit = silent
) -> dict[str, Path]:
    """Export from a finished run, or from a folder that `autopeft train` wrote.

    Args:
        source: the folder.
        kinds: formats.
        output: where to; `exports/` in the source when None.
        trial: a trial of the run instead of its winner.
        emit: what is told.

    Raises:
        StoreError: when the folder holds no trained plan.
    """
    plan_path, adapter = trained_plan(source, trial)
    plan = read_plan(plan_path)
    study = study_from_dict(plan.study)
    prepared = prepare(study)
    if plan.head:
        prepared.head = plan.head
    record = record_of(source, prepared)
    return deliver(prepared, plan, adapter, record, output or source / "exports", kinds, required=True, emit=emit)


def trained_plan(source: Path, trial: int | None) -> tuple[Path, Path]:
    """Paths of the plan and of the trained adapter in a finished run, or in a folder that `autopeft train` wrote.

    Raises:
        StoreError: when the folder holds no trained plan, or the run no such trial.
    """
    record_path = source / "record.json"
    if trial is None and (source / "plan.json").is_file() and (source / "adapter.safetensors").is_file():
        return source / "plan.json", source / "adapter.safetensors"
    if not record_path.is_file():
        raise StoreError(f"{source} holds neither a finished run (record.json) nor a trained plan (plan.json)")
    record = decode(Record, read_json(record_path), str(record_path))
    if trial is None:
        winner = record.contenders[0]
        seed = next(o.seed for o in winner.outcomes if o.status == "done")
        number, adapter = (
            winner.trial,
            source / "finish" / f"{winner.trial:04d}" / f"seed{seed}" / "adapter.safetensors",
        )
    else:
        number, adapter = trial, source / "trials" / f"{trial:04d}" / "adapter.safetensors"
    found = next((t for t in record.trials if t.number == number), None)
    if found is None or not found.plan:
        raise StoreError(f"the run {source} has no trial {number} with a plan")
    if not adapter.is_file():
        raise StoreError(f"trial {number} of {source} has no saved adapter at {adapter.relative_to(source)}")
    return source / found.plan, adapter


def record_of(source: Path, prepared: Prepared) -> Record:
    """The record of a finished run, or one that knows model, data and budget alone."""
    path = source / "record.json"
    if path.is_file():
        try:
            return decode(Record, read_json(path), str(path))
        except CorruptFile:
            pass
    return Record(
        str(source), {}, model_facts(prepared), data_facts(prepared), budget_facts(prepared.budget), (), best=-1
    )


def sample_images(prepared: Prepared) -> Tensor:
    """Some images of the outer split, in evaluation order."""
    for batch in prepared.task.batches("outer", batch_size=_IMAGES):
        found: Tensor = batch[0][:_IMAGES]
        return found
    raise UsageError("the outer split is empty")


def with_exports(record: Record, exports: Mapping[str, Path], run: Path) -> Record:
    """The record with the exports' paths relative to the run folder."""
    paths: dict[str, Any] = {kind: str(path.relative_to(run)) for kind, path in exports.items()}
    return dataclasses.replace(record, exports=paths)
