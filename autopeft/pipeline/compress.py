"""`autopeft compress`: a trained plan made smaller, with the loss that it costs."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from autopeft.compression.file import LOADER_NAME, loader_source
from autopeft.compression.record import CompressionRecord
from autopeft.compression.settings import CompressionSettings
from autopeft.config.decode import study_from_dict
from autopeft.core.codec import decode, encode
from autopeft.errors import ExportError, StaleRun, StoreError
from autopeft.export.compressed import Change, change_of, write_compressed
from autopeft.export.verify import verify_all
from autopeft.pipeline.deliver import record_of, sample_images, trained_plan
from autopeft.pipeline.events import Emit, Event, silent
from autopeft.pipeline.facts import environment_facts
from autopeft.pipeline.planfile import Plan, read_plan, write_plan
from autopeft.pipeline.prepare import Prepared, prepare
from autopeft.pipeline.restore import restore
from autopeft.pipeline.shrink import Shrinker, Shrunk
from autopeft.store.atomic import read_json, write_json
from autopeft.store.paths import RunFolder
from autopeft.training.threads import thread_count

if TYPE_CHECKING:
    from torch import Tensor, nn

    from autopeft.core.contracts import Inserted

__all__ = ["RECORD_NAME", "compress", "compress_again"]

RECORD_NAME = "compress.json"
_FILE = "compressed.safetensors"


def compress(
    source: Path,
    settings: CompressionSettings,
    output: Path | None = None,
    *,
    trial: int | None = None,
    device: str | None = None,
    emit: Emit = silent,
) -> tuple[CompressionRecord, Path]:
    """Drop and quantise what a plan has trained, and measure each step on the outer split.

    The test split stays as it is, sealed or opened: it is never looked at. Nothing is written unless the result is
    smaller, its loss within the limit, and the file gives the same logits in a process without autopeft.

    Args:
        source: a finished run, a folder that `autopeft train` wrote, or the `plan.json` in it.
        settings: what is done.
        output: where to; a folder of the source named after the settings when None.
        trial: a trial of the run instead of its winner.
        device: another device than the plan's.
        emit: what is told.

    Returns:
        What was done, and where it lies.

    Raises:
        StoreError: when there is no trained plan.
        StaleRun: when model or data are not those that it was trained with.
        UsageError: when the settings have no effect on this plan.
        ExportError: when the result is larger, or its loss higher than allowed.
    """
    source = _folder(source)
    target = output or RunFolder(source).compressed / settings.slug
    with tempfile.TemporaryDirectory(prefix="autopeft-compress-") as name:
        record = _staged(source, settings, Path(name), trial, device, emit)
        record = dataclasses.replace(record, source=os.path.relpath(source.resolve(), target.resolve()))
        try:
            shutil.copytree(Path(name) / "out", target, dirs_exist_ok=True)
        except (OSError, shutil.Error) as error:
            raise StoreError(f"cannot write to {target}: {error}") from error
    # Last, so that a folder with a record is whole.
    write_json(target / RECORD_NAME, encode(record))
    return record, target


def compress_again(path: Path, *, device: str | None = None, emit: Emit = silent) -> CompressionRecord:
    """Do again what a `compress.json` describes, write nothing, and compare the files.

    Raises:
        StaleRun: when the plan was trained again since.
        ExportError: when the file comes out differently.
    """
    before = decode(CompressionRecord, read_json(path), str(path))
    source = (path.parent / before.source).resolve()
    _, adapter = trained_plan(source, before.trial)
    if _sha256(adapter) != before.adapter_sha256:
        raise StaleRun(f"the adapter in {source} is not the one that {path} was made of; it was trained again since")
    with tempfile.TemporaryDirectory(prefix="autopeft-compress-") as name:
        found = _staged(source, before.settings, Path(name), before.trial, device, emit, reload=False)
    if found.sha256 != before.sha256:
        raise ExportError(
            f"{path} came out differently: the SHA-256 of {_FILE} was {before.sha256[:12]}, now it is "
            f"{found.sha256[:12]}; another device, other threads or other versions have chosen another divisor"
        )
    emit(Event("result", f"{_FILE}: the same {found.steps[-1].bytes:,} bytes again"))
    return dataclasses.replace(found, source=before.source, difference=before.difference)


def _staged(
    source: Path,
    settings: CompressionSettings,
    folder: Path,
    trial: int | None,
    device: str | None,
    emit: Emit,
    *,
    reload: bool = True,
) -> CompressionRecord:
    """Everything but delivering: the result lies in `out` below the folder; `reload` proves it in a fresh process."""
    plan_path, adapter = trained_plan(source, trial)
    plan = read_plan(plan_path)
    study = study_from_dict(plan.study)
    threads = study.train.threads or plan.threads
    study = dataclasses.replace(
        study,
        head_warmup=False,
        device=study.device if device is None else device,
        train=dataclasses.replace(study.train, threads=threads),
    )
    run = source if RunFolder(source).splits.is_file() else None
    prepared = prepare(study, run)
    _check_fresh(plan, prepared)
    if plan.head:
        prepared.head = plan.head
    provenance = record_of(source, prepared)
    emit(Event("stage", f"{adapter}: {len(plan.allocation)} options, measured on the outer split"))
    seen = _outer_was_seen(source, trial)
    if seen:
        emit(
            Event(
                "warning",
                f"the run's winner was trained on the outer split too, so these losses are flattering; to measure on "
                f"data it has not seen: autopeft train {plan_path} -o FOLDER, then compress FOLDER",
            )
        )
    plain = copy.deepcopy(prepared.model)
    metadata = {"base_sha256": plan.weights_hash, "plan": plan.allocation.digest}
    shrinker = Shrinker(prepared, study, settings, plain, metadata, folder, emit)
    with (
        thread_count(prepared.threads),
        study.backend.insert(
            prepared.model, prepared.catalog, plan.allocation, study.methods, seed=plan.seed, head=prepared.head
        ) as inserted,
    ):
        restore(inserted, adapter)
        adapter_bytes = shrinker.size_of(inserted.stored())
        change, reason = _change(inserted) if settings.of == "change" else (None, "")
        found = shrinker.change(change) if change is not None else shrinker.tensors(inserted, reason)
        out = folder / "out"
        alone = write_compressed(
            inserted,
            provenance,
            out,
            found.tensors,
            found.metadata,
            change=change,
            loader=(LOADER_NAME, loader_source()),
            sections=[("What it costs", _table(found))],
        )
        difference = None
        if alone and reload:
            images = sample_images(prepared)
            logits = _logits(found.model, images.to(prepared.device))
            checked = verify_all({"compressed": out}, images, logits, inserted=inserted, record=provenance)
            difference = checked["compressed"]
            emit(Event("result", f"same logits in a fresh process, difference {difference:.1e}"))
    if change is None:
        write_plan(plan, out / "plan.json")
    return CompressionRecord(
        source=str(source),
        trial=trial,
        plan=plan.allocation.digest,
        adapter_sha256=_sha256(adapter),
        form="tensors" if change is None else "change",
        settings=settings,
        steps=found.steps,
        seen=seen,
        sha256=_sha256(out / _FILE),
        adapter_bytes=adapter_bytes,
        q=found.rescaling.q,
        eta=found.rescaling.eta,
        tried=found.rescaling.trace,
        plain=found.rescaling.plain,
        unseen=found.rescaling.unseen,
        whole=found.whole,
        difference=difference,
        reason=reason,
        environment=environment_facts(prepared),
    )


def _folder(source: Path) -> Path:
    """The folder of a trained plan that may be named by its file."""
    if source.is_file():
        if not (source.parent / "adapter.safetensors").is_file():
            raise StoreError(
                f"there is no adapter.safetensors beside {source}, so nothing is trained; "
                f"train the plan with: autopeft train {source}"
            )
        return source.parent
    if not source.is_dir():
        raise StoreError(f"there is no run and no trained plan at {source}")
    return source


def _check_fresh(plan: Plan, prepared: Prepared) -> None:
    pairs = {
        "model": (plan.fingerprint, prepared.catalog.fingerprint),
        "weights of the model": (plan.weights_hash, prepared.loaded.weights_hash),
        "data": (plan.data_hash, prepared.task.data_hash),
    }
    for what, (then, now) in pairs.items():
        if then and then != now:
            raise StaleRun(
                f"the {what} changed since the plan was trained (hash {then[:12]} then, {now[:12]} now), so the loss "
                f"before and after cannot be compared"
            )


def _outer_was_seen(source: Path, trial: int | None) -> bool | None:
    """Whether the adapter was trained on the outer split; None when nothing says so."""
    if not RunFolder(source).record.is_file():
        return None
    return trial is None


def _change(inserted: Inserted) -> tuple[Change | None, str]:
    try:
        return change_of(inserted), ""
    except ExportError as error:
        return None, str(error)


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    """What the model gives, in full float32 precision also on devices that round convolutions by default."""
    with torch.no_grad(), torch.backends.cudnn.flags(allow_tf32=False):
        logits: Tensor = model.eval()(images).float().cpu()
    return logits


def _table(found: Shrunk) -> str:
    names: Mapping[str, float] = found.steps[0].metrics
    lines = ["| step | bytes | loss | " + " | ".join(names) + " |", "| :--- | ---: | ---: |" + " ---: |" * len(names)]
    for step in found.steps:
        numbers = " | ".join(f"{step.metrics[name]:.4f}" for name in names)
        lines.append(f"| {step.name} | {step.bytes:,} | {step.loss:.4f} | {numbers} |")
    return "On the outer split:\n\n" + "\n".join(lines)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
