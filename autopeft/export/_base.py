"""The base model beside an adapter, for those who cannot fetch it by name."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from autopeft.core.contracts import Inserted
from autopeft.core.record import Record
from autopeft.export._card import base_call, hub_id
from autopeft.export._denoiser import component_of, not_diffusers, write_denoiser
from autopeft.export._model import States
from autopeft.export._timm_folder import class_names, write_timm_folder

__all__ = ["BaseChoice", "base_expression", "includes_base", "write_base"]

BaseChoice = Literal["auto", "always", "never"]
"""Whether the base model is written beside the adapter; `auto` does so when it cannot be fetched by name."""


def includes_base(choice: BaseChoice, record: Record) -> bool:
    """Whether the export holds the base model itself."""
    if choice != "auto":
        return choice == "always"
    study = record.study.get("model")
    from_file = isinstance(study, dict) and study.get("pretrained_path") is not None
    spec = str(record.model.get("spec") or record.model.get("name") or "")
    return from_file or not (hub_id(record) or spec.startswith("local-dir:"))


def write_base(inserted: Inserted, states: States, record: Record, folder: Path) -> tuple[Path, ...]:
    """Write the plain base model as a timm or diffusers folder, its classifier zero: that belongs to the adapter."""
    state = {n: torch.zeros_like(t) if n in states.classifier else t for n, t in states.base.items()}
    if not not_diffusers(inserted.model):
        return write_denoiser(inserted.model, state, folder)
    return write_timm_folder(inserted.model, state, record, folder)


def base_expression(choice: BaseChoice, inserted: Inserted, record: Record) -> str:
    """The Python expression that builds the base, for a README."""
    inside = "FOLDER/base" if includes_base(choice, record) else ""
    if not not_diffusers(inserted.model):
        spec = str(record.model.get("spec") or "").removeprefix("diffusers:").partition("#")[0]
        kind = type(inserted.model).__name__
        part = "" if inside else f', subfolder="{component_of(inserted.model)}"'
        return f'diffusers.{kind}.from_pretrained("{inside or spec}"{part})'
    return base_call(record, len(class_names(record, inserted.model)), inside)
