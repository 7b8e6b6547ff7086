"""`autopeft eval`: an exported model or a finished run on data."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autopeft.core.outcome import Split
from autopeft.errors import DataError, StoreError
from autopeft.models.load import load_model
from autopeft.models.spec import ModelSpec
from autopeft.pipeline.device import choose_device
from autopeft.store.atomic import read_json
from autopeft.training.evaluate import evaluate

if TYPE_CHECKING:
    from autopeft.config.study import Study

__all__ = ["evaluate_export"]


def evaluate_export(source: Path, study: Study, split: Split, label_names: bool = True) -> dict[str, Any]:
    """Evaluate a merged timm folder (or a run that has one) on a split of the study's data.

    Args:
        source: a folder written by `--to timm`, or a finished run.
        study: names data, batch size and device.
        split: which split; opening the test split here is not counted as the run's own look at it.
        label_names: refuse data whose classes are not the model's.

    Returns:
        Metrics and the 95 % interval of the accuracy.

    Raises:
        StoreError: when there is no such export.
        DataError: when the classes differ.
    """
    folder = _timm_folder(source)
    loaded = load_model(ModelSpec(f"local-dir:{folder.resolve()}"))
    data = {f.name: getattr(study.data, f.name) for f in dataclasses.fields(study.data) if f.name != "spec"}
    task = study.task.open(study.data.spec, loaded.data_config, None, study.seed, data)
    names = read_json(folder / "config.json").get("label_names")
    if label_names and names and list(names) != list(task.classes):
        raise DataError(
            f"the model was trained for the classes {', '.join(map(str, names[:5]))}..., the data has "
            f"{', '.join(task.classes[:5])}...; evaluate it on data with the same class names"
        )
    if split == "test":
        task.unseal_test()
    device = choose_device(study.device)
    found = evaluate(loaded.model.to(device), task, split, device)
    return {
        "schema": "autopeft.eval/1",
        "model": str(folder),
        "data": study.data.spec,
        "split": split,
        "samples": task.sizes[split],
        "metrics": dict(found.metrics),
        "interval": list(found.interval),
    }


def _timm_folder(source: Path) -> Path:
    for folder in (source, source / "exports" / "timm", source / "timm"):
        if (folder / "config.json").is_file() and (folder / "model.safetensors").is_file():
            return folder
    raise StoreError(
        f"{source} holds no merged model (config.json and model.safetensors); make one with autopeft export --to timm"
    )
