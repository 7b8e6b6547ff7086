"""Singular vectors and other tensors derived from pre-trained weights, computed once and shared by all trials."""

from __future__ import annotations

import hashlib
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["LARGEST_RANK", "all_singular", "derived", "top_singular"]

LARGEST_RANK = 64
"""Columns that are kept of each basis."""

_KEPT = 1024
"""Bases that are kept; a ViT-B's 48 matrices take 38 MB."""

_lock = threading.Lock()
_digests: dict[tuple[int, tuple[int, int] | None], tuple[weakref.ref[Tensor], int, int, str]] = {}
_bases: OrderedDict[str, tuple[Tensor, Tensor]] = OrderedDict()
_derived: OrderedDict[tuple[str, str], tuple[Tensor, ...]] = OrderedDict()

_DERIVED_BYTES = 1 << 30
"""What whole decompositions may take; those of a ViT-B's 48 matrices take 0.5 GB."""


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
            whole = _derived.get(("svd", digest))
            if whole is None:
                pair = _decompose(tensor if rows is None else tensor[rows[0] : rows[1]])
            else:
                pair = whole[0][:, :LARGEST_RANK].clone(), whole[2][:, :LARGEST_RANK].clone()
            _bases[digest] = pair
            if len(_bases) > _KEPT:
                _bases.popitem(last=False)
        _bases.move_to_end(digest)
    return pair[0][:, :rank], pair[1][:, :rank]


def all_singular(tensor: Tensor, rows: tuple[int, int] | None) -> tuple[Tensor, Tensor, Tensor]:
    """Every singular triple of a weight, flattened to (out, in); else as `top_singular`.

    Args:
        tensor: the whole weight of the host (or of the evidence), of any rank >= 2 and on any device.
        rows: the rows of a slice, None for all.

    Returns:
        `(U, s, V)` with m = min(out, in): (out, m), (m,) decreasing, (in, m); float32 on the CPU, not to be written to.
    """
    u, values, v = derived("svd", tensor, rows, _triples)
    return u, values, v


def derived(
    name: str, tensor: Tensor, rows: tuple[int, int] | None, compute: Callable[[Tensor], tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    """Tensors computed from the rows of a weight, remembered by the weight's content.

    The least recently used are forgotten when all together take more than 1 GiB.

    Args:
        name: what `compute` computes; equal names mean equal functions.
        tensor: the whole weight, on any device; the rule on `.data` of `top_singular` holds.
        rows: the rows of a slice, None for all.
        compute: given the rows, detached; must depend on nothing else.

    Returns:
        What `compute` returned, not to be written to.
    """
    with _lock:
        key = (name, _digest(tensor, rows))
        found = _derived.get(key)
        if found is None:
            found = compute(tensor.detach() if rows is None else tensor.detach()[rows[0] : rows[1]])
            _derived[key] = found
            while len(_derived) > 1 and sum(t.nbytes for kept in _derived.values() for t in kept) > _DERIVED_BYTES:
                _derived.popitem(last=False)
        _derived.move_to_end(key)
    return found


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
    u, _, v = _triples(weight)
    return u[:, :LARGEST_RANK].contiguous(), v[:, :LARGEST_RANK].contiguous()


def _triples(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    matrix = weight.detach().flatten(1).to(device="cpu", dtype=torch.float64)
    u, values, vh = torch.linalg.svd(matrix, full_matrices=False)
    v = vh.T
    largest = u.abs().argmax(dim=0)
    sign = torch.where(u.gather(0, largest[None])[0] < 0, -1.0, 1.0)
    return (u * sign).float().contiguous(), values.float(), (v * sign).float().contiguous()
