"""What a compressed change is on disk: parts, codes and a seed."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from autopeft.compression import loader
from autopeft.compression.dare import Dropped, threshold_of
from autopeft.compression.quantise import Codes, Quantised, quantise
from autopeft.errors import CorruptFile

__all__ = ["LOADER_NAME", "contents", "loader_source", "quantise_parts", "read_parts"]

LOADER_NAME = "load_compressed.py"
"""What the loader is called beside a compressed change."""

_ENTRY_BYTES = 96
"""About what a tensor's codes add to the header; a tensor whose codes save less stays as it is."""


def quantise_parts(
    parts: Mapping[str, Tensor], bits: int, codes: Codes, *, head: frozenset[str] = frozenset()
) -> dict[str, Tensor | Quantised]:
    """Give codes to every part that gets smaller by it.

    Positions, whole tensors (`NAME.full`: statistics, the classifier) and what saves less than its own description stay
    as they are.

    Args:
        parts: part name to tensor.
        bits: bits per value.
        codes: what the bits stand for.
        head: names of the parts of the classifier that are given codes all the same.
    """
    found: dict[str, Tensor | Quantised] = {}
    for key, tensor in parts.items():
        whole = key.rpartition(".")[2] in ("full", "idx") or not tensor.is_floating_point()
        saved = tensor.numel() * tensor.element_size() - (-(-tensor.numel() * bits // 8))
        stays = (whole and key not in head) or saved <= _ENTRY_BYTES
        found[key] = tensor if stays else quantise(tensor, bits, codes)
    return found


def contents(
    parts: Mapping[str, Tensor | Quantised], dropped: Dropped | None, metadata: Mapping[str, str]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and texts of the file, as `loader.read_compressed` reads them back.

    Args:
        parts: what is stored; names ending in `.kept` belong to `dropped`.
        dropped: whose draws decide the positions of the `.kept` parts.
        metadata: further texts for the header.
    """
    layout: dict[str, dict[str, Any]] = {}
    tensors: dict[str, Tensor] = {}
    for key, part in parts.items():
        how: dict[str, Any] = {}
        if isinstance(part, Quantised):
            how = {"shape": list(part.shape), "bits": part.bits, "codes": part.codes}
            how |= {"scale": part.scale, "offset": part.offset}
            tensors[key] = part.packed
            if part.codes == "lloyd":
                tensors["codes"] = part.table()
        elif key.endswith(".idx"):
            tensors[key], how = _packed_positions(part)
        else:
            tensors[key] = part
        name, _, kind = key.rpartition(".")
        if kind == "kept" and dropped is not None:
            how |= {"of": list(dropped.kept[name].shape), "rows": [list(run) for run in dropped.kept[name].rows]}
        if how:
            layout[key] = how
    texts = {"format": loader.FORMAT, "version": loader.VERSION, **metadata}
    if dropped is not None:
        texts |= {"seed": str(dropped.seed), "threshold": str(threshold_of(dropped.drop))}
    texts["layout"] = json.dumps(layout, separators=(",", ":"), sort_keys=True)
    return tensors, texts


def _packed_positions(positions: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """Increasing positions in the smallest form: a bit per entry, distances of 1 or 2 bytes, or as they are."""
    exact = positions.long().numpy()
    gaps = np.diff(exact, prepend=-1)
    if not len(exact) or gaps.min() < 1:
        return positions, {}
    count = int(exact[-1]) + 1
    sizes = {"": positions.element_size() * len(exact), "mask": -(-count // 8)}
    sizes |= {f"gaps{width}": width * len(exact) for width in (1, 2) if gaps.max() < 256**width}
    how = min(sizes, key=lambda name: sizes[name])
    if not how:
        return positions, {}
    if how == "mask":
        mask = np.zeros(count, dtype=np.uint8)
        mask[exact] = 1
        packed = np.packbits(mask)
    else:
        packed = gaps.astype("<u1" if how == "gaps1" else "<u2").view(np.uint8)
    return torch.from_numpy(packed), {"positions": how, "count": count}


def loader_source() -> str:
    """The text of the stand-alone loader."""
    return inspect.getsource(loader)


def read_parts(path: Path) -> dict[str, Tensor]:
    """The parts in a file, decoded; see `loader.read_compressed`.

    Raises:
        CorruptFile: when it is missing, damaged, or no compressed change.
    """
    try:
        return loader.read_compressed(path)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CorruptFile(f"{path} is no compressed change that can be read: {error}") from error
