"""Flags to settings of the study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autopeft.errors import UsageError

if TYPE_CHECKING:
    from autopeft.config.study import Study

__all__ = ["read_study", "study_flags"]


def study_flags(
    *,
    model: str | None = None,
    pretrained: bool | None = None,
    pretrained_path: Path | None = None,
    img_size: int | None = None,
    model_kwargs: Sequence[str] | None = None,
    data: str | None = None,
    task: str | None = None,
    budget: str | None = None,
    methods: str | None = None,
    scorer: str | None = None,
    allocator: str | None = None,
    require: Sequence[str] | None = None,
    forbid: Sequence[str] | None = None,
    tie: Sequence[str] | None = None,
    max_options: int | None = None,
    max_methods: int | None = None,
    max_size: Sequence[str] | None = None,
    every_block: bool | None = None,
    target: str | None = None,
    max_rank: int | None = None,
    max_flops: str | None = None,
    max_memory: str | None = None,
    backend: str | None = None,
    batch_size: int | None = None,
    epochs: int | None = None,
    trials: int | None = None,
    time_limit: float | None = None,
    seeds: int | None = None,
    space: str | None = None,
    sampler: str | None = None,
    contenders: str | None = None,
    tier: str | None = None,
    warm_start: Sequence[Path] | None = None,
    seed: int | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """Dotted paths of the study for the flags that were given."""
    paths: dict[str, Any] = {
        "model.spec": model,
        "model.pretrained": pretrained,
        "model.pretrained_path": str(pretrained_path) if pretrained_path is not None else None,
        "model.img_size": img_size,
        "data.spec": data,
        "task": task,
        "budget": budget,
        "methods": _names(methods),
        "scorer": scorer,
        "allocator": allocator,
        "allocator.require": list(require) if require else None,
        "allocator.forbid": list(forbid) if forbid else None,
        "allocator.tie": list(tie) if tie else None,
        "allocator.max_options": max_options,
        "allocator.max_methods": max_methods,
        "allocator.max_size": dict(_pair(text, "--max-size", "METHOD=SIZE") for text in max_size) if max_size else None,
        "allocator.every_block": every_block,
        "limits.target": target,
        "limits.max_rank": max_rank,
        "limits.max_flops": max_flops,
        "limits.max_memory": max_memory,
        "backend": backend,
        "data.batch_size": batch_size,
        "train.epochs": epochs,
        "search.trials": trials,
        "search.time_limit": time_limit,
        "search.seeds": seeds,
        "search.space": space,
        "search.sampler": sampler,
        "search.contenders": contenders,
        "search.tier": tier,
        "search.warm_start": [str(run) for run in warm_start] if warm_start else None,
        "seed": seed,
        "device": device,
    }
    given = {path: value for path, value in paths.items() if value is not None}
    if model_kwargs:
        given["model.kwargs"] = dict(_pair(text, "--model-kwargs", "KEY=VALUE") for text in model_kwargs)
    return given


def read_study(config: Sequence[Path] | None, flags: Mapping[str, Any], overrides: Sequence[str] | None) -> Study:
    """The study of the configuration files, then the flags, then the `key.path=value` arguments.

    Raises:
        UsageError: naming the key and its place.
    """
    from autopeft.config.decode import load_study
    from autopeft.config.override import parse_assignments

    return load_study(list(config or []), {**flags, **parse_assignments(list(overrides or []))})


def _names(text: str | None) -> list[str] | None:
    if text is None:
        return None
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise UsageError("--methods names no method; write it as --methods lora,core,bias")
    return names


def _pair(text: str, flag: str, form: str) -> tuple[str, Any]:
    import yaml

    key, separator, value = text.partition("=")
    if not separator or not key:
        raise UsageError(f"{flag} takes {form}, got {text!r}")
    return key, yaml.safe_load(value)
