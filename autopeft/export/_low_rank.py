"""The low-rank changes of a plan, gathered per host module."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autopeft.core.contracts import Inserted
from autopeft.export._model import adapters_of, listed
from autopeft.methods.base import Adapter

__all__ = ["Factors", "gather_factors", "not_low_rank", "why_not_low_rank"]


@dataclass(frozen=True, slots=True, eq=False)
class Factors:
    """`up @ down`, added to the flattened weight of a host.

    Attributes:
        module: dotted path of the host.
        shape: shape of the host's whole weight.
        down: (r, in_features).
        up: (out_features, r) of the whole weight; the rows of other slices are zero.
    """

    module: str
    shape: tuple[int, ...]
    down: Tensor
    up: Tensor

    @property
    def rank(self) -> int:
        """Rows of `down`."""
        return int(self.down.shape[0])


def not_low_rank(inserted: Inserted) -> str:
    """Which options are no low-rank change of a plain Linear or Conv2d; empty when all are."""
    reasons = [
        f"{key} ({why})"
        for key, adapter in adapters_of(inserted).items()
        if (why := why_not_low_rank(inserted.model, adapter))
    ]
    return listed(reasons)


def gather_factors(inserted: Inserted, adapters: Iterable[Adapter]) -> tuple[Factors, ...]:
    """One pair of factors per host, in model order.

    Slices of a fused projection become one low-rank change of the whole: their ranks add up, and every slice's part of
    `up` fills its own rows.

    Args:
        inserted: the plan.
        adapters: adapters that are a low-rank change.
    """
    by_host: dict[str, list[tuple[Adapter, Tensor, Tensor]]] = {}
    for adapter in adapters:
        pair = adapter.low_rank()
        assert pair is not None
        down, up = (t.detach().to("cpu", torch.float32) for t in pair)
        by_host.setdefault(adapter.site.module, []).append((adapter, down, up))
    order = [name for name, _ in inserted.model.named_modules()]
    found = []
    for module in sorted(by_host, key=order.index):
        weight = inserted.model.get_submodule(module).weight
        assert isinstance(weight, Tensor)
        members = sorted(by_host[module], key=lambda m: m[0].site.rows or (0, 0))
        rank = sum(down.shape[0] for _, down, _ in members)
        up_whole = torch.zeros(weight.shape[0], rank)
        column = 0
        for adapter, _, up in members:
            start, stop = adapter.site.rows or (0, weight.shape[0])
            up_whole[start:stop, column : column + up.shape[1]] = up
            column += up.shape[1]
        found.append(Factors(module, tuple(weight.shape), torch.cat([down for _, down, _ in members]), up_whole))
    return tuple(found)


def why_not_low_rank(model: nn.Module, adapter: Adapter) -> str:
    """Why one adapter is no low-rank change of a plain Linear or Conv2d; empty when it is."""
    if adapter.low_rank() is None:
        return "no low-rank change"
    if adapter.site.groups > 1:
        return "a convolution in groups"
    if adapter.form not in ("branch", "stand_in"):
        return "its host is not linear in its weight"
    dilation = getattr(model.get_submodule(adapter.site.module), "dilation", (1,))
    return "a dilated convolution" if any(d != 1 for d in dilation) else ""
