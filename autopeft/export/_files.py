"""Safetensors as every format writes them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from autopeft.store.atomic import replacing

__all__ = ["write_tensors"]


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    """Write tensors atomically.

    Args:
        path: the file; folders above it are made.
        tensors: by name; views and tied tensors are written out, because the format knows neither.
        metadata: texts for the file's header, beside `format: pt`.
    """
    plain = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        save_file(plain, temporary, {"format": "pt", **(metadata or {})})
    return path
