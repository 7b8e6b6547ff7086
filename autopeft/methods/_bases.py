"""Top singular vectors of pre-trained weights, computed once and shared by all trials of a process."""

from __future__ import annotations

import hashlib
import threading
import weakref
from collections import OrderedDict

import torch
from torch import Tensor

__all__ = ["LARGEST_RANK", "top_singular"]

LARGEST_RANK = 64
"""Columns that are kept of each basis."""

_KEPT = 1024
"""Bases that are kept; a ViT-B's 48 matrices take 38 MB."""

_lock = threading.Lock()
_digests: dict[tuple[int, tuple[int, int] | None], tuple[weakref.ref[Tensor], int, int, str]] = {}
_bases: OrderedDict[str, tuple[Tensor, Tensor]] = OrderedDict()


def top_singular(tensor: Tensor, rows: tuple[int, int] | None, rank: int) -> tuple[Tensor, Tensor]:
    """The first `rank` left and right singular vectors of a weight, flattened to (out, in).

    They are computed in float64 on the CPU and rounded to float32. The sign of a pair is fixed by making the entry of
    largest magnitude of its left vector positive (the first of them, when several tie). The result depends on the
    weight's values alone, up to the choice within an eigenspace when singular values coincide.

    The cache knows a tensor by identity and version, and a changed or copied one by its content; writing through
    `.data` is invisible to the version, so it must not be used on a weight that bases were taken of.

    Args:
        tensor: the whole weight of the host (or of the evidence), of any rank >= 2 and on any device.
        rows: the rows of a slice, None for all.
        rank: columns wanted, at most 64 and at most the smaller dimension.

    Returns:
        `(U, V)`: float32 on the CPU, (out, rank) and (in, rank); views of the cache, not to be written to.
    """
    with _lock:
        digest = _digest(tensor, rows)
        pair = _bases.get(digest)
        if pair is None:
            pair = _decompose(tensor if rows is None else tensor[rows[0] : rows[1]])
            _bases[digest] = pair
            if len(_bases) > _KEPT:
                _bases.popitem(last=False)
        _bases.move_to_end(digest)
    return pair[0][:, :rank], pair[1][:, :rank]


def _digest(tensor: Tensor, rows: tuple[int, int] | None) -> str:
    """Digest of the rows' values, remembered as long as the tensor lives unchanged."""
    key = (id(tensor), rows)
    known = _digests.get(key)
    if known is not None:
        alive, version, address, digest = known
        if alive() is tensor and version == tensor._version and address == tensor.data_ptr():
            return digest
    part = tensor.detach() if rows is None else tensor.detach()[rows[0] : rows[1]]
    part = part.flatten(1).to("cpu").contiguous()
    content = hashlib.blake2b(repr((part.shape, part.dtype)).encode(), digest_size=16)
    content.update(part.view(torch.uint8).numpy().data)
    digest = content.hexdigest()
    gone = weakref.ref(tensor, lambda _: _digests.pop(key, None))
    _digests[key] = (gone, tensor._version, tensor.data_ptr(), digest)
    return digest


def _decompose(weight: Tensor) -> tuple[Tensor, Tensor]:
    matrix = weight.detach().flatten(1).to(device="cpu", dtype=torch.float64)
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    kept = min(LARGEST_RANK, u.shape[1])
    u, v = u[:, :kept], vh[:kept].T
    largest = u.abs().argmax(dim=0)
    sign = torch.where(u.gather(0, largest[None])[0] < 0, -1.0, 1.0)
    return (u * sign).float().contiguous(), (v * sign).float().contiguous()
