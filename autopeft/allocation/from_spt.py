"""The allocation files that were released with SPT, as plans of this package."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from autopeft.allocation._released import load
from autopeft.allocation._spt_parts import ENTRIES, TOKENS, VECTORS, class_token, key_for, make_option
from autopeft.core.allocation import Allocation, Provenance
from autopeft.core.budget import Budget
from autopeft.errors import CorruptFile, UsageError

if TYPE_CHECKING:
    from autopeft.core.contracts import Method
    from autopeft.core.menu import Option
    from autopeft.core.site import Catalog, Site, Slot

__all__ = ["SptFile", "read_spt", "spt_allocation"]

_OPERATIONS = ("attn.q", "attn.k", "attn.v", "attn.proj", "mlp.fc1", "mlp.fc2")
"""Columns of the grid of tuned matrices."""

_KEYS = (
    "params",
    "structured_params",
    "tuned_matrices",
    "tuned_vectors",
    "unstructured_indexes",
    "unstructured_name_shapes",
    "unstructured_params",
)


@dataclass(frozen=True, slots=True, eq=False)
class SptFile:
    """What a released file says.

    Attributes:
        matrices: names of the matrices with a structured module, such as `blocks.0.attn.q`.
        vectors: names of the vectors that are trained whole, such as `blocks.0.norm1.weight`.
        entries: per name of a tensor the increasing flat positions of its trained entries, numpy int64; tensors
            without any are left out.
        shapes: shape of every tensor that entries could have been taken from.
        structured_params: the file's own count of parameters in modules and whole vectors.
        unstructured_params: the file's own count of single entries.
        params: the file's own total. It counts the class token.
    """

    matrices: tuple[str, ...]
    vectors: tuple[str, ...]
    entries: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    structured_params: int
    unstructured_params: int
    params: int

    @property
    def token_params(self) -> int:
        """What the total counts beyond modules, vectors and entries: the class token."""
        return self.params - self.structured_params - self.unstructured_params


def read_spt(path: Path | str) -> SptFile:
    """Read a released allocation file (`param_req_*.pth`, a torch archive) without running anything in it.

    Raises:
        CorruptFile: when it is not one, is damaged, or asks for a class that no such file holds.
    """
    path = Path(path)
    data = load(path)
    if not isinstance(data, dict) or any(key not in data for key in _KEYS):
        missing = [key for key in _KEYS if not isinstance(data, dict) or key not in data]
        raise CorruptFile(f"{path} is no SPT allocation: it lacks {', '.join(missing)}")
    try:
        return _interpret(data)
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise CorruptFile(f"{path} is no SPT allocation: {error}") from error


def _interpret(data: Mapping[str, Any]) -> SptFile:
    grid = data["tuned_matrices"]
    if any(len(row) != len(_OPERATIONS) or not set(row) <= {0, 1} for row in grid):
        raise ValueError(f"its grid of matrices does not have {len(_OPERATIONS)} columns of 0 and 1")
    shapes = {str(name): tuple(int(d) for d in shape) for name, shape in data["unstructured_name_shapes"].items()}
    flat = np.sort(np.asarray(data["unstructured_indexes"], dtype=np.int64))
    ends = np.cumsum([0, *(math.prod(shape) for shape in shapes.values())])
    if len(flat) and (flat[0] < 0 or flat[-1] >= ends[-1] or bool((flat[1:] == flat[:-1]).any())):
        raise ValueError(f"its positions are not distinct positions among {int(ends[-1]):,} entries")
    cuts = np.searchsorted(flat, ends)
    entries = {name: flat[cuts[i] : cuts[i + 1]] - ends[i] for i, name in enumerate(shapes) if cuts[i + 1] > cuts[i]}
    vectors = tuple(str(name) for name in data["tuned_vectors"])
    if len(set(vectors)) != len(vectors):
        raise ValueError("it lists a vector twice")
    return SptFile(
        matrices=tuple(
            f"blocks.{b}.{op}" for b, row in enumerate(grid) for op, on in zip(_OPERATIONS, row, strict=True) if on
        ),
        vectors=vectors,
        entries=entries,
        shapes=shapes,
        structured_params=int(data["structured_params"]),
        unstructured_params=round(float(data["unstructured_params"])),
        # Millions in float32; the counts below 2^24 that it was made from come back exactly.
        params=round(float(data["params"]) * 1e6),
    )


def spt_allocation(
    file: SptFile,
    catalog: Catalog,
    methods: Mapping[str, Method],
    method_key: str = "lora",
    rank: int = 8,
    budget: Budget | None = None,
) -> Allocation:
    """The file's plan on a model of ours.

    q, k and v become slices of a fused projection where the model has one. Entries inside of norms, which the released
    code counts and never trains, are trained here.

    Args:
        file: what `read_spt` gave.
        catalog: catalogue of a vision transformer with timm's names.
        methods: the study's methods by key: the structured one, `vector` and `bias`, `sparse` and `sparse_bias`, and
            `tokens` are needed as far as the file asks for them.
        method_key: what serves as structured module; `lora` for the released LoRA files, `adapter` for the others.
        rank: its size; 8 in every released file.
        budget: what the plan must fit; its own cost when None.

    Raises:
        UsageError: when the model lacks a tensor of the file or has it in another shape, or a method is missing.
        InfeasibleBudget: when the plan costs more than the budget.
    """
    options = [make_option(methods, method_key, _site(catalog, name), rank) for name in file.matrices]
    for name in file.vectors:
        site, slot = _tensor(catalog, name)
        options.append(make_option(methods, _needed(methods, VECTORS, site, slot), site, 1))
    for name, positions in file.entries.items():
        site, slot = _tensor(catalog, name)
        held = site.shape if slot == "weight" else site.shape[:1]
        if held != file.shapes[name]:
            raise UsageError(f"the SPT file has {name} in shape {file.shapes[name]}, this model has it in {held}")
        key = _needed(methods, ENTRIES, site, slot)
        options.append(make_option(methods, key, site, len(positions), 0.0, positions))
    if file.token_params:
        options.append(_token(catalog, methods, file.token_params))
    spent = sum(option.cost.trainable for option in options)
    provenance = Provenance(f"spt file(method={method_key!r}, rank={rank})")
    return Allocation(tuple(options), budget or Budget(spent), provenance)


def _token(catalog: Catalog, methods: Mapping[str, Method], expected: int) -> Option:
    site = class_token(catalog.sites)
    if site is None or site.n_weight != expected:
        found = "none" if site is None else f"one of {site.n_weight}"
        raise UsageError(f"the SPT file trains a class token of {expected} entries, this model has {found}")
    return make_option(methods, TOKENS, site, 1)


def _tensor(catalog: Catalog, name: str) -> tuple[Site, Slot]:
    module, _, kind = name.rpartition(".")
    if kind not in ("weight", "bias"):
        raise UsageError(f"the SPT file names {name!r}, which is neither a weight nor a bias")
    return _site(catalog, module), "weight" if kind == "weight" else "bias"


def _site(catalog: Catalog, name: str) -> Site:
    """The site of a module of the released code, which splits the fused projection into three."""
    block, _, part = name.rpartition(".")
    for candidate in (name, f"{block}.qkv[{part}]"):
        if candidate in catalog:
            return catalog[candidate]
    raise UsageError(
        f"the SPT file adapts {name!r}, which this model ({catalog.architecture or 'unknown'}, {catalog.n_depth} "
        "blocks) does not have; the released files belong to ViT-B/16"
    )


def _needed(methods: Mapping[str, Method], keys: tuple[str, ...], site: Site, slot: Slot) -> str:
    key = key_for(methods, keys, site, slot)
    if key is None:
        raise UsageError(
            f"the SPT file trains the {slot} of {site.name}; add one of the methods {' or '.join(keys)} to the study"
        )
    return key
