"""Safetensors as every format writes them."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from autopeft.store.atomic import write_bytes

__all__ = ["write_tensors"]

_ALIGNMENT = 8


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    """Write tensors atomically; the same tensors and texts give the same bytes.

    Args:
        path: the file; folders above it are made.
        tensors: by name; views and tied tensors are written out, because the format knows neither.
        metadata: texts for the file's header, beside `format: pt`.
    """
    plain = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    write_bytes(path, _ordered(save(plain, {"format": "pt", **(metadata or {})})))
    return path


def _ordered(data: bytes) -> bytes:
    """The file with its texts in alphabetical order: safetensors writes them in the order of a random hash."""
    (length,) = struct.unpack("<Q", data[:_ALIGNMENT])
    header = json.loads(data[_ALIGNMENT : _ALIGNMENT + length])
    texts = dict(sorted(header.pop("__metadata__", {}).items()))
    text = json.dumps({"__metadata__": texts, **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text + data[_ALIGNMENT + length :]
