"""What a record says about model, data, budget and environment."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from autopeft.config.registries import SAMPLERS
from autopeft.core.budget import Budget
from autopeft.core.record import Trial

if TYPE_CHECKING:
    from autopeft.config.study import Study
    from autopeft.pipeline.prepare import Prepared

__all__ = ["budget_facts", "data_facts", "environment_facts", "model_facts", "search_facts"]


def model_facts(prepared: Prepared) -> dict[str, Any]:
    """Name, architecture, arguments, preprocessing, parameters and hashes of the model."""
    loaded, catalog = prepared.loaded, prepared.catalog
    config = dict(loaded.data_config)
    if isinstance(found := config.get("diffusion"), Mapping):
        # Where the files of this machine lie is no fact about the model.
        config["diffusion"] = {key: value for key, value in found.items() if key != "folder"}
    return {
        "name": loaded.name,
        "spec": prepared.study.model.spec,
        "architecture": loaded.architecture,
        "model_args": dict(loaded.model_args),
        "pretrained_tag": loaded.pretrained_tag,
        "data_config": _plain(config),
        "n_base": catalog.n_base,
        "n_head": catalog.n_head,
        "n_depth": catalog.n_depth,
        "head": list(catalog.head),
        "fingerprint": catalog.fingerprint,
        "weights_hash": loaded.weights_hash,
    }


def data_facts(prepared: Prepared) -> dict[str, Any]:
    """Specification, classes, sizes of the splits and hash of the data."""
    task = prepared.task
    return {
        "spec": prepared.study.data.spec,
        "classes": list(task.classes),
        "sizes": dict(task.sizes),
        "data_hash": task.data_hash,
    }


def budget_facts(budget: Budget) -> dict[str, Any]:
    """Limit, unit, share and text of the budget."""
    return {"limit": budget.limit, "unit": budget.unit, "share_of": budget.share_of, "text": budget.text}


def search_facts(study: Study, trials: Sequence[Trial]) -> dict[str, Any]:
    """Goals, what was made of them, the sampler, and the trials of ours on the front."""
    goals = study.goals
    ours = [t for t in trials if t.role not in ("baseline", "reference") and t.outcome.status == "done"]
    return {
        "goals": [{"name": n, "direction": d} for n, d in zip(goals.names, goals.directions, strict=True)],
        "mode": goals.mode,
        "chosen_by": study.chosen_by,
        "limits": dict(goals.limits),
        "sampler": SAMPLERS.name_of(type(study.search.sampler)),
        "front": [ours[i].number for i in goals.on_front([t.rewards for t in ours])] if len(goals.names) > 1 else [],
    }


def environment_facts(prepared: Prepared) -> dict[str, Any]:
    """Versions, device and threads."""
    device = prepared.device
    name = "cpu"
    if device.type == "cuda":
        import torch

        name = torch.cuda.get_device_name(device)
    return {
        "python": platform.python_version(),
        "device": name,
        "threads": prepared.threads,
        **{package: _version(package) for package in ("autopeft", "torch", "timm", "optuna", "peft")},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)
