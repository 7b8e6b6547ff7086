"""DARE: drop most entries of a trained change at random and rescale the others."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from autopeft.compression.loader import kept_positions
from autopeft.errors import UsageError

__all__ = ["Dropped", "Kept", "dense_change", "drop_change", "output_moments", "threshold_of"]

_PARTS = ("A", "B", "delta", "idx", "val")
_MOST_RUNS = 32
"""Ranges of rows that are worth naming; a change in more places is drawn over the whole tensor."""


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """The entries of one tensor's change that the draw keeps, as they were trained.

    Attributes:
        values: float32 of shape (n,).
        positions: flat positions in the tensor, int64 of shape (n,), increasing.
        shape: the tensor's shape.
        rows: ranges of the first dimension that were drawn in; empty when the positions have to be stored, because the
            change was sparse before.
    """

    values: Tensor
    positions: Tensor
    shape: tuple[int, ...]
    rows: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True, eq=False)
class Dropped:
    """A change most of whose entries are dropped, not yet rescaled.

    Attributes:
        kept: tensor name to what is left of its change.
        parts: every other part of the change, as it was.
        seed: seed of the draw.
        drop: probability of being dropped.
    """

    kept: Mapping[str, Kept]
    parts: Mapping[str, Tensor]
    seed: int
    drop: float

    def rescaled(self, q: Mapping[str, float]) -> dict[str, Tensor]:
        """All parts, the kept values divided by their tensor's `q`, as `NAME.kept` or as `NAME.idx` and `NAME.val`."""
        found = dict(self.parts)
        for name, kept in self.kept.items():
            values = kept.values / q[name]
            if kept.rows:
                found[f"{name}.kept"] = values
            else:
                small = math.prod(kept.shape) <= torch.iinfo(torch.int32).max
                found[f"{name}.idx"] = kept.positions.to(torch.int32) if small else kept.positions
                found[f"{name}.val"] = values
        return found

    def resolved(self, q: Mapping[str, float]) -> dict[str, Tensor]:
        """The same with every position written out, as `loader.patched` takes it."""
        found = dict(self.parts)
        for name, kept in self.kept.items():
            found[f"{name}.idx"], found[f"{name}.val"] = kept.positions, kept.values / q[name]
        return found


def threshold_of(drop: float) -> int:
    """The probability of being kept as a share of 2^64; see `loader.kept_positions`.

    Raises:
        UsageError: when `drop` does not lie between 0 and 1.
    """
    if isinstance(drop, bool) or not isinstance(drop, int | float) or not 0 < drop < 1:
        raise UsageError(f"drop is the share of entries to drop, above 0 and below 1, got {drop!r}")
    return min(int((1.0 - drop) * 2.0**64), 2**64 - 1)


def drop_change(
    parts: Mapping[str, Tensor],
    shapes: Mapping[str, Sequence[int]],
    names: Sequence[str],
    drop: float,
    seed: int,
    *,
    even_larger: bool = False,
) -> Dropped:
    """Drop every entry of some tensors' change with probability `drop`, independently.

    "Language Models are Super Mario" (DARE, arXiv 2311.03099): what is left is divided by `q = 1 - drop`, so that the
    expected change of every output stays; `Dropped.rescaled` does that, with this `q` or another.

    A tensor whose change was sparse is drawn from its changed entries, any other from all entries of its changed rows.

    Args:
        parts: the change, as the `delta` export lists it.
        shapes: tensor name to shape.
        names: the tensors to drop from; those that `parts` does not change are passed over.
        drop: probability of being dropped.
        seed: the same seed, the same draw, on every machine.
        even_larger: drop also where what is left has more numbers than the change is stored in (low-rank factors).
    """
    threshold = threshold_of(drop)
    kept: dict[str, Kept] = {}
    left = dict(parts)
    for name in names:
        mine = {part: parts[f"{name}.{part}"] for part in _PARTS if f"{name}.{part}" in parts}
        if not mine:
            continue
        shape = tuple(shapes[name])
        if "idx" in mine:
            order = kept_positions(name, (len(mine["idx"]),), [(0, len(mine["idx"]))], str(seed), threshold)
            chosen = torch.from_numpy(order)
            found = Kept(mine["val"][chosen].float(), mine["idx"][chosen].long(), shape, ())
        else:
            change = dense_change(parts, name, shape)
            rows = _runs(change)
            positions = torch.from_numpy(kept_positions(name, shape, rows, str(seed), threshold))
            found = Kept(change.flatten()[positions], positions, shape, rows)
            if not even_larger and len(positions) >= sum(tensor.numel() for tensor in mine.values()):
                continue
        kept[name] = found
        for part in mine:
            del left[f"{name}.{part}"]
    return Dropped(kept, left, seed, drop)


def dense_change(parts: Mapping[str, Tensor], name: str, shape: Sequence[int]) -> Tensor:
    """The change of one tensor with all its entries, float32 of the tensor's shape; zero where it has none."""
    if f"{name}.delta" in parts:
        return parts[f"{name}.delta"].float().view(*shape)
    if f"{name}.B" in parts:
        return (parts[f"{name}.B"].float() @ parts[f"{name}.A"].float()).view(*shape)
    change = torch.zeros(math.prod(shape))
    if f"{name}.idx" in parts:
        change[parts[f"{name}.idx"].long()] = parts[f"{name}.val"].float()
    return change.view(*shape)


def output_moments(change: Tensor, x: Tensor, drop: float, q: float | None = None) -> tuple[Tensor, Tensor]:
    """Mean and variance, over the draw, of what the dropped change adds to a linear layer's output.

    With independent keeping probability `1 - p`, entry `ij` contributes `d_ij x_j / q` or nothing: the mean is
    `(1 - p) / q * (d x)_i` and the variance `p (1 - p) / q^2 * sum_j (d_ij x_j)^2`.

    Args:
        change: the change `d`, (out, in).
        x: one input, (in,).
        drop: probability `p` of being dropped.
        q: what the kept entries are divided by; `1 - p` when None.

    Returns:
        Two tensors of shape (out,).
    """
    keep = 1.0 - drop
    divisor = keep if q is None else q
    return (change @ x) * (keep / divisor), (change**2 @ x**2) * (drop * keep / divisor**2)


def _runs(change: Tensor) -> tuple[tuple[int, int], ...]:
    """Ranges of rows with any change; the whole tensor when there are too many."""
    alive = [0, *change.flatten(1).any(dim=1).int().tolist(), 0] if change.ndim > 1 else []
    starts = [i - 1 for i in range(1, len(alive)) if alive[i] > alive[i - 1]]
    stops = [i - 1 for i in range(1, len(alive)) if alive[i] < alive[i - 1]]
    if not starts or len(starts) > _MOST_RUNS:
        return ((0, change.shape[0]),)
    return tuple(zip(starts, stops, strict=True))
