"""Houlsby: a bottleneck behind a residual branch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from autopeft.core.budget import Cost
from autopeft.core.menu import Option
from autopeft.core.scores import Evidence
from autopeft.core.site import Site, Slot
from autopeft.errors import UsageError
from autopeft.methods._bottleneck import Activation, BottleneckModule, bottleneck_size
from autopeft.methods._parallel import branch_gains, branch_sizes
from autopeft.methods._sizes import check_size
from autopeft.methods._traits import ChoosesNothing

__all__ = ["Houlsby"]


@dataclass(frozen=True, slots=True)
class Houlsby(ChoosesNothing):
    """`f + U act(D f + d) + u` with f the output of attention or MLP, before it joins the residual stream.

    Houlsby et al., 2019, arXiv 1902.00751, figure 2. It cannot be merged. Sizes are bottleneck widths.
    In the paper every block has one adapter behind each of its branches; here each is an option of its own. LayerScale
    and stochastic depth, where a block has them, act on the sum.

    Attributes:
        activation: between the two matrices; the paper leaves it open, its code takes GELU.
        spread: standard deviation of D and U at the start. 0 draws D like a Linear layer and sets U to zero: an exact
            identity. The paper draws both from a normal distribution of deviation 0.01 cut off at two deviations (its
            code: 0.001), which is near the identity.
    """

    activation: Activation = "gelu"
    spread: float = 0.0

    family: ClassVar[str] = "adapter"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.spread) and self.spread >= 0):
            raise UsageError(f"houlsby: spread must be a number of at least 0, got {self.spread!r}")

    def slots(self, site: Site) -> tuple[Slot, ...]:
        """`output` of a residual branch."""
        return ("output",) if self.sizes(site) else ()

    def sizes(self, site: Site) -> tuple[int, ...]:
        """Powers of two up to half of the channels."""
        return branch_sizes(site, ("attn", "mlp"))

    def cost(self, site: Site, size: int) -> Cost:
        """`2 C h + h + C`; added parameters count as entries, since no tensor of the model can hold them."""
        h = check_size("houlsby", site, size, self.sizes(site))
        n = bottleneck_size(site.out_features, h)
        return Cost.plain(n, entries=n, tensors=4)

    def mergeable(self, site: Site) -> bool:
        """No: a bottleneck is not linear in its input."""
        return False

    def build(self, site: Site, option: Option, host: nn.Module, generator: torch.Generator) -> BottleneckModule:
        """D random and the others zero, or both matrices small."""
        h = check_size("houlsby", site, option.size, self.sizes(site))
        return BottleneckModule(site, host, h, generator, self.activation, self.spread)

    def gains(self, site: Site, evidence: Evidence, sizes: Sequence[int]) -> tuple[float, ...]:
        """A proxy: 1/4 of the h largest squared singular values of the block's `sum over tokens of dL/dy y^T`.

        The gradient at the branch's output is the one at the block's, but the branch's output is not the block's.
        Without such evidence the gain is 0.
        """
        return branch_gains(evidence, sizes)
