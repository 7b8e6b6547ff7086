"""A denoiser as diffusers writes it, and the pipeline around it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from autopeft.core.record import Record
from autopeft.export._files import write_tensors
from autopeft.store.atomic import write_bytes, write_text

__all__ = ["component_of", "not_diffusers", "pipeline_folder", "write_denoiser", "write_pipeline"]

_LABELS = {"class_embedding.weight": ("num_class_embeds", 0), "embedding_table.weight": ("num_embeds_ada_norm", 1)}
"""End of a table's name to the setting that gives its rows, and how many rows it has besides."""

_PRIVATE = ("_name_or_path",)
"""Settings that say where the model came from on this machine."""


def not_diffusers(model: nn.Module) -> str:
    """Why diffusers could not rebuild the model from its settings; empty when it can."""
    if type(model).__module__.partition(".")[0] == "diffusers" and hasattr(model, "to_json_string"):
        return ""
    return f"{type(model).__name__} is no model of diffusers"


def component_of(model: nn.Module) -> str:
    """What a pipeline calls the model: `unet` or `transformer`."""
    return "unet" if type(model).__name__.startswith("UNet") else "transformer"


def write_denoiser(model: nn.Module, state: Mapping[str, Tensor], folder: Path) -> tuple[Path, Path]:
    """Write `config.json` and `diffusion_pytorch_model.safetensors`, for `from_pretrained`.

    Args:
        model: the borrowed model, for its settings alone.
        state: state dict of the plain model; a table of labels says itself how many it has.
        folder: where to.

    Returns:
        The paths of the two files.
    """
    told: Any = model
    config: dict[str, Any] = json.loads(told.to_json_string())
    for key in _PRIVATE:
        config.pop(key, None)
    for name, tensor in state.items():
        for end, (key, more) in _LABELS.items():
            if name.endswith(end) and key in config:
                config[key] = len(tensor) - more
    path = folder / "config.json"
    write_text(path, json.dumps(config, indent=2, sort_keys=True) + "\n")
    return path, write_tensors(folder / "diffusion_pytorch_model.safetensors", state)


def pipeline_folder(record: Record) -> Path | None:
    """The folder of the pipeline that the model was taken from; None when it came alone or is no longer there."""
    facts = (record.model.get("data_config") or {}).get("diffusion") or {}
    folder = Path(str(facts.get("folder") or ""))
    return folder if facts.get("folder") and folder.is_dir() else None


def write_pipeline(component: str, record: Record, folder: Path) -> tuple[Path, ...]:
    """Copy the pipeline's other parts: scheduler, autoencoder, text encoder, `model_index.json`.

    Where there is no pipeline any more, the scheduler's settings are written from the record.

    Args:
        component: the part that is written anew.
        record: knows where the pipeline lies.
        folder: where to.

    Returns:
        The files written.
    """
    source, written = pipeline_folder(record), []
    if source is not None and (source / component).is_dir():
        index = source / "model_index.json"
        parts = [p for p in sorted(source.iterdir()) if p.is_dir() and p.name != component and _is_part(p)]
        for path in ([index] if index.is_file() else []) + [f for p in parts for f in sorted(p.rglob("*"))]:
            if path.is_file():
                target = folder / path.relative_to(source)
                write_bytes(target, path.read_bytes())
                written.append(target)
    scheduler = folder / "scheduler" / "scheduler_config.json"
    facts = (record.model.get("data_config") or {}).get("diffusion") or {}
    if scheduler not in written and facts.get("scheduler"):
        write_text(scheduler, json.dumps(facts["scheduler"], indent=2, sort_keys=True) + "\n")
        written.append(scheduler)
    return tuple(written)


def _is_part(folder: Path) -> bool:
    """A part of a pipeline has settings of its own; anything else in the folder is somebody's."""
    return any((folder / name).is_file() for name in ("config.json", "scheduler_config.json", "tokenizer_config.json",
                                                      "preprocessor_config.json"))  # fmt: skip
