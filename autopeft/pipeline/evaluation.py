"""`autopeft eval`: an exported model, a trained plan or a finished run on data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autopeft.config.decode import load_study, study_from_dict
from autopeft.config.override import override
from autopeft.core.contracts import Task
from autopeft.core.outcome import Split
from autopeft.errors import DataError, StaleRun, StoreError
from autopeft.models.load import load_model
from autopeft.models.spec import ModelSpec
from autopeft.pipeline.device import choose_device
from autopeft.pipeline.planfile import read_plan
from autopeft.pipeline.prepare import prepare
from autopeft.pipeline.restore import restore
from autopeft.store.atomic import read_json
from autopeft.training.evaluate import Evaluation, evaluate
from autopeft.training.threads import thread_count

__all__ = ["evaluate_export"]


def evaluate_export(
    source: Path, settings: Mapping[str, Any], split: Split, label_names: bool = True
) -> dict[str, Any]:
    """Evaluate a merged timm folder, or a plan with its trained adapter, on a split of some data.

    Args:
        source: a folder written by `--to timm` or `--to native` or by `autopeft train`, or a finished run, whose merged
            model is taken if it has one and else its native export.
        settings: dotted paths of the study to values: data, batch size, seed and device. The data that the plan or the
            run was trained with when none are named.
        split: which split; opening the test split here is not counted as the run's own look at it.
        label_names: refuse data whose classes are not the model's.

    Returns:
        Metrics and the 95 % interval of the accuracy.

    Raises:
        StoreError: when there is no such export.
        StaleRun: when the base model of a plan is not the one it was trained on.
        DataError: when the classes differ.
    """
    folder = _timm_folder(source)
    if folder is not None:
        return _evaluate_merged(folder, source, settings, split, label_names)
    folder = _plan_folder(source)
    if folder is not None:
        return _evaluate_plan(folder, settings, split, label_names)
    raise StoreError(
        f"{source} holds neither a merged model (config.json and model.safetensors) nor a trained plan (plan.json and "
        f"adapter.safetensors); make one with autopeft export --to timm or --to native"
    )


def _evaluate_merged(
    folder: Path, source: Path, settings: Mapping[str, Any], split: Split, label_names: bool
) -> dict[str, Any]:
    config = [source / "study.yaml"] if (source / "study.yaml").is_file() else []
    study = load_study(config, dict(settings))
    loaded = load_model(ModelSpec(f"local-dir:{folder.resolve()}"))
    data = {f.name: getattr(study.data, f.name) for f in dataclasses.fields(study.data) if f.name != "spec"}
    task = study.task.open(study.data.spec, loaded.data_config, None, study.seed, data)
    if label_names:
        _check_classes(task, read_json(folder / "config.json").get("label_names"))
    if split == "test":
        task.unseal_test()
    device = choose_device(study.device)
    found = evaluate(loaded.model.to(device), task, split, device)
    return _told(folder, study.data.spec, split, task, found)


def _evaluate_plan(folder: Path, settings: Mapping[str, Any], split: Split, label_names: bool) -> dict[str, Any]:
    plan = read_plan(folder / "plan.json")
    study = override(study_from_dict(plan.study), settings)
    # The trained head comes with the adapter.
    prepared = prepare(dataclasses.replace(study, head_warmup=False))
    now = {"model": prepared.catalog.fingerprint, "weights": prepared.loaded.weights_hash}
    for what, then in {"model": plan.fingerprint, "weights": plan.weights_hash}.items():
        if then and then != now[what]:
            raise StaleRun(
                f"the {what} of {study.model.spec} changed since the plan in {folder} was trained "
                f"({then[:12]} then, {now[what][:12]} now)"
            )
    task = prepared.task
    if label_names and (folder / "metadata.json").is_file():
        _check_classes(task, read_json(folder / "metadata.json").get("data", {}).get("classes"))
    if split == "test":
        task.unseal_test()
    with (
        thread_count(prepared.threads),
        study.backend.insert(
            prepared.model, prepared.catalog, plan.allocation, study.methods, seed=plan.seed, head=prepared.head
        ) as inserted,
    ):
        restore(inserted, folder / "adapter.safetensors")
        inserted.train_mode(False)
        found = evaluate(inserted.model, task, split, prepared.device)
    return _told(folder, study.data.spec, split, task, found)


def _check_classes(task: Task, names: object) -> None:
    if isinstance(names, list) and names and names != list(task.classes):
        raise DataError(
            f"the model was trained for the classes {', '.join(map(str, names[:5]))}..., the data has "
            f"{', '.join(task.classes[:5])}...; evaluate it on data with the same class names"
        )


def _told(folder: Path, data: str, split: Split, task: Task, found: Evaluation) -> dict[str, Any]:
    return {
        "schema": "autopeft.eval/1",
        "model": str(folder),
        "data": data,
        "split": split,
        "samples": task.sizes[split],
        "metrics": dict(found.metrics),
        "interval": list(found.interval),
    }


def _timm_folder(source: Path) -> Path | None:
    return _first(source, "timm", "config.json", "model.safetensors")


def _plan_folder(source: Path) -> Path | None:
    return _first(source, "native", "plan.json", "adapter.safetensors")


def _first(source: Path, kind: str, *files: str) -> Path | None:
    for folder in (source, source / "exports" / kind, source / kind):
        if all((folder / name).is_file() for name in files):
            return folder
    return None
