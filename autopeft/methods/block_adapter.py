"""A bottleneck adapter behind a residual block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from autopeft.core.budget import Cost
from autopeft.core.menu import Option
from autopeft.core.scores import Evidence
from autopeft.core.site import Site, Slot
from autopeft.methods._bottleneck import BottleneckModule, bottleneck_size
from autopeft.methods._sizes import check_size, powers_of_two
from autopeft.methods._spectrum import captured, squared_singular_values
from autopeft.methods._traits import ChoosesNothing

__all__ = ["BlockAdapter"]

_SLOPE_SQUARED = 0.25
"""Squared derivative of GELU at 0."""


@dataclass(frozen=True, slots=True)
class BlockAdapter(ChoosesNothing):
    """`y + U gelu(D y + d) + u` on the output of a residual block (Houlsby et al., 2019, arXiv 1902.00751, figure 2).

    It cannot be merged. Sizes are bottleneck widths.
    """

    family: ClassVar[str] = "adapter"

    def slots(self, site: Site) -> tuple[Slot, ...]:
        """`output` of a block."""
        return ("output",) if self.sizes(site) else ()

    def sizes(self, site: Site) -> tuple[int, ...]:
        """Powers of two up to half of the channels."""
        if site.kind != "block" or "output" not in site.slots:
            return ()
        return powers_of_two(site.out_features // 2)

    def cost(self, site: Site, size: int) -> Cost:
        """`2 C r + r + C`; added parameters count as entries, since no tensor of the model can hold them."""
        r = check_size("block_adapter", site, size, self.sizes(site))
        n = bottleneck_size(site.out_features, r)
        return Cost.plain(n, entries=n, tensors=4)

    def build(self, site: Site, option: Option, host: nn.Module, generator: torch.Generator) -> BottleneckModule:
        """D random, the others zero."""
        r = check_size("block_adapter", site, option.size, self.sizes(site))
        return BottleneckModule(site, host, r, generator)

    def gains(self, site: Site, evidence: Evidence, sizes: Sequence[int]) -> tuple[float, ...]:
        """The r largest squared singular values of `sum over tokens of dL/dy y^T`, times GELU's squared slope at 0.

        Scorers that look at parameters alone keep no such evidence; the gain is then 0 for every size.
        """
        output = evidence.get("output")
        if output is None:
            return (0.0,) * len(sizes)
        return tuple(_SLOPE_SQUARED * top for top in captured(squared_singular_values(output.signal), sizes))

    def mergeable(self, site: Site) -> bool:
        """No: a bottleneck is not linear in its input."""
        return False
