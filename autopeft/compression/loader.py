"""Reads `compressed.safetensors`; needs torch, numpy and safetensors, and no other file of any package.

A copy of this file lies beside every compressed change as `load_compressed.py`:

    from load_compressed import apply_compressed

    apply_compressed(model, "compressed.safetensors")   # model: the base model, with the classifier's new size

The file holds parts of tensors, `NAME.PART`:

- `NAME.full`: the tensor itself (the classifier, statistics);
- `NAME.delta`: what is added to the tensor;
- `NAME.idx`, `NAME.val`: flat positions, and what is added to the entries there;
- `NAME.A`, `NAME.B`: the product `B @ A` is added to the flattened tensor;
- `NAME.kept`: what is added to the entries that a seeded draw keeps; the positions are drawn again, not stored.

Any part may be stored as codes of a few bits, and positions as a bit mask or as distances; the header's `layout` (JSON)
says which are and how.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor, nn

__all__ = ["FORMAT", "VERSION", "apply_compressed", "kept_positions", "patched", "read_compressed", "unpack"]

FORMAT = "autopeft-compressed"
VERSION = "1"


def apply_compressed(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Add the change in a file to a base model, in place.

    Args:
        model: the base model with its pre-trained weights and as many outputs as the classifier was trained with.
        path: `compressed.safetensors`.

    Raises:
        ValueError: when the file is no compressed change.
    """
    model.load_state_dict(patched(model.state_dict(), read_compressed(path)))


def patched(state: Mapping[str, Tensor], parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with the parts that `read_compressed` gave in it; the given tensors stay as they are."""
    found = dict(state)
    for key, value in parts.items():
        name, _, part = key.rpartition(".")
        if part in ("A", "val"):
            continue
        target = found[name].clone()
        if part == "full":
            target = value.to(target.device, target.dtype).view(target.shape)
        elif part == "delta":
            target += value.to(target.device, target.dtype).view(target.shape)
        elif part == "idx":
            change = parts[f"{name}.val"].to(target.device, target.dtype)
            target.view(-1)[value.to(target.device).long()] += change
        elif part == "B":
            target += (value @ parts[f"{name}.A"]).to(target.device, target.dtype).view(target.shape)
        else:
            raise ValueError(f"{key} is no part that this version of the format knows")
        found[name] = target
    return found


def read_compressed(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The parts in a file, decoded: codes as float32 values, drawn positions as `NAME.idx` and `NAME.val`.

    Raises:
        ValueError: when the file is no compressed change.
    """
    with safe_open(os.fspath(path), framework="pt") as file:
        metadata: dict[str, str] = file.metadata() or {}
        stored: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    if metadata.get("format") != FORMAT or metadata.get("version") != VERSION:
        raise ValueError(f"{os.fspath(path)} is not of format {FORMAT} {VERSION}")
    layout: dict[str, dict[str, Any]] = json.loads(metadata["layout"])
    table = stored.pop("codes", None)
    parts: dict[str, Tensor] = {}
    for key, tensor in stored.items():
        how = layout.get(key, {})
        values = _decoded(tensor, how, table) if "bits" in how else tensor
        if "positions" in how:
            values = _positions(tensor, how["positions"], how["count"])
        if "of" not in how:
            parts[key] = values
            continue
        name = key.removesuffix(".kept")
        positions = kept_positions(name, how["of"], how["rows"], metadata["seed"], int(metadata["threshold"]))
        if len(positions) != len(values):
            raise ValueError(f"{key} holds {len(values)} values, its seed draws {len(positions)} positions")
        parts[f"{name}.idx"], parts[f"{name}.val"] = torch.from_numpy(positions), values
    return parts


def kept_positions(
    name: str, shape: Sequence[int], rows: Sequence[Sequence[int]], seed: str, threshold: int
) -> NDArray[np.int64]:
    """Flat positions of the entries that the draw keeps, increasing.

    Each entry of the rows has a 64-bit word of its own and is kept when the word is below the threshold. The words are
    the raw output of a Philox4x64 generator keyed with the SHA-256 of seed and name: the same on every machine and, by
    NumPy's promise for bit generators (NEP 19), in every version.

    Args:
        name: the tensor's name, so that each tensor has its own draw.
        shape: the tensor's shape.
        rows: ranges (start, stop) of its first dimension within which entries are drawn.
        seed: any text.
        threshold: the probability of being kept times 2^64.
    """
    width = math.prod(shape[1:])
    inside = np.concatenate([np.arange(start * width, stop * width, dtype=np.int64) for start, stop in rows])
    key = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:16], "little")
    words = np.random.Philox(key=key).random_raw(len(inside))
    found: NDArray[np.int64] = inside[words < np.uint64(threshold)]
    return found


def unpack(packed: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.uint8]:
    """Codes of `bits` bits each, the first in the highest bits of the first byte."""
    flat = np.unpackbits(packed, count=count * bits).reshape(count, bits)
    whole = np.zeros((count, 8), dtype=np.uint8)
    whole[:, 8 - bits :] = flat
    return np.packbits(whole, axis=1).reshape(count)


def _positions(packed: Tensor, how: str, count: int) -> Tensor:
    """Increasing positions from a bit per entry (`mask`) or from distances of 1 or 2 bytes (`gaps1`, `gaps2`)."""
    if how == "mask":
        return torch.from_numpy(np.flatnonzero(np.unpackbits(packed.numpy(), count=count)))
    gaps = packed.numpy().view("<u1" if how == "gaps1" else "<u2").astype(np.int64)
    return torch.from_numpy(np.cumsum(gaps) - 1)


def _decoded(packed: Tensor, how: Mapping[str, Any], table: Tensor | None) -> Tensor:
    """`table[code] * scale + offset`, float32; the code itself where there is no table."""
    codes = torch.from_numpy(unpack(packed.numpy(), how["bits"], math.prod(how["shape"]))).long()
    steps = codes.float() if how["codes"] == "uniform" or table is None else table[codes]
    values: Tensor = steps * how["scale"] + how["offset"]
    return values.view(how["shape"])
