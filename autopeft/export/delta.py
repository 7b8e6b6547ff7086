"""The change of every changed tensor, as small as it goes, for torch and safetensors alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from autopeft.core.contracts import Inserted
from autopeft.core.record import Record
from autopeft.errors import UsageError
from autopeft.export._base import BaseChoice, base_expression, includes_base, write_base
from autopeft.export._card import card
from autopeft.export._files import write_tensors
from autopeft.export._low_rank import gather_factors
from autopeft.export._model import (
    States,
    adapters_of,
    not_mergeable,
    not_timm,
    states_of,
    tensor_names,
    trained_statistics,
)
from autopeft.methods.base import Adapter
from autopeft.store.atomic import write_text

__all__ = ["APPLY", "DeltaExport", "changes_of"]

APPLY = """from safetensors.torch import load_file


def apply_delta(model, path):
    delta, state = load_file(path), {k: v.clone() for k, v in model.state_dict().items()}
    for name, part in (key.rsplit(".", 1) for key in delta):
        if part == "full": state[name] = delta[f"{name}.full"]
        if part == "delta": state[name] += delta[f"{name}.delta"]
        if part == "idx": state[name].view(-1)[delta[f"{name}.idx"].long()] += delta[f"{name}.val"]
        if part == "B": state[name] += (delta[f"{name}.B"] @ delta[f"{name}.A"]).view_as(state[name])
    model.load_state_dict(state)"""
"""The function in the README. `verify` runs it from there."""

_FORMAT = {
    "full": "the tensor itself (the classifier, statistics)",
    "delta": "what is added to the tensor",
    "idx": "flat positions of the changed entries, with `.val`: what is added to them",
    "B": "with `.A`: the product `B @ A` is added to the flattened tensor",
}


@dataclass(frozen=True, slots=True)
class DeltaExport:
    """`delta.safetensors` and `README.md`, which holds the function that applies it.

    A tensor changed by low-rank options alone is stored as their factors, one with few changed entries as positions and
    values, any other as a dense difference; the classifier as it is.

    Attributes:
        base: whether the base model is written into `base/`.
    """

    base: BaseChoice = "auto"

    def __post_init__(self) -> None:
        if self.base not in get_args(BaseChoice):
            raise UsageError(f"base must be one of {', '.join(get_args(BaseChoice))}, got {self.base!r}")

    def supports(self, inserted: Inserted) -> str:
        """Every option must be mergeable, and timm must know the architecture of the base."""
        if reason := not_mergeable(inserted):
            return f"options that are no change of the model's own tensors: {reason}"
        return not_timm(inserted.model)

    def export(self, inserted: Inserted, record: Record, folder: Path) -> tuple[Path, ...]:
        """Write the folder.

        Raises:
            ExportError: when an option cannot be merged.
        """
        states = states_of(inserted)
        metadata = {
            "format": "autopeft-delta",
            "version": "1",
            "base_sha256": str(record.model.get("weights_hash", "")),
            "plan": inserted.allocation.digest,
        }
        paths = [write_tensors(folder / "delta.safetensors", changes_of(inserted, states), metadata)]
        if includes_base(self.base, record):
            paths += write_base(inserted, states, record, folder / "base")
        expression = base_expression(self.base, inserted, record)
        use = f'import timm\n\nmodel = {expression}\napply_delta(model, "FOLDER/delta.safetensors")\nmodel.eval()'
        parts = "\n".join(f"- `NAME.{part}`: {text}" for part, text in _FORMAT.items())
        text = card(
            f"Weight change for {record.model.get('architecture', 'a model')}, trained with autopeft",
            inserted,
            record,
            library="timm",
            sections=[
                ("Apply", f"```python\n{APPLY}\n```\n\n```python\n{use}\n```"),
                ("Format", f"`delta.safetensors` holds changed tensors only:\n\n{parts}"),
            ],
            adapter=True,
        )
        paths.append(folder / "README.md")
        write_text(paths[-1], text)
        return tuple(paths)


def changes_of(inserted: Inserted, states: States) -> dict[str, Tensor]:
    """The content of `delta.safetensors`: every changed tensor in its smallest form, as `NAME.PART`."""
    whole = {*states.classifier, *trained_statistics(inserted)}
    factors = _factors(inserted)
    found: dict[str, Tensor] = {}
    for name, merged in states.merged.items():
        if name in whole:
            found[f"{name}.full"] = merged
            continue
        base = states.base[name]
        if torch.equal(base, merged):
            continue
        if name in factors:
            found[f"{name}.A"], found[f"{name}.B"] = factors[name]
            continue
        change = (merged.double() - base.double()).to(merged.dtype).flatten()
        positions = change.nonzero().flatten()
        index = torch.int32 if change.numel() <= torch.iinfo(torch.int32).max else torch.int64
        if positions.numel() * (index.itemsize + change.element_size()) < change.numel() * change.element_size():
            found[f"{name}.idx"], found[f"{name}.val"] = positions.to(index), change[positions]
        else:
            found[f"{name}.delta"] = change.view_as(merged)
    return found


def _factors(inserted: Inserted) -> dict[str, tuple[Tensor, Tensor]]:
    """Names of tensors that low-rank options alone have changed, with `(A, B)` of the whole tensor.

    Factors that are no smaller than the tensor are left out.
    """
    adapters = adapters_of(inserted)
    touching: dict[str, list[Adapter]] = {}
    for adapter in adapters.values():
        for name in tensor_names(adapter):
            touching.setdefault(name, []).append(adapter)
    low = {n: members for n, members in touching.items() if all(a.low_rank() is not None for a in members)}
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for name, members in low.items():
        (factors,) = gather_factors(inserted, members)
        if factors.down.numel() + factors.up.numel() < math.prod(factors.shape):
            pairs[name] = factors.down, factors.up
    return pairs
