"""AdaptFormer: a bottleneck beside the MLP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from autopeft.core.budget import Cost
from autopeft.core.menu import Option
from autopeft.core.scores import Evidence
from autopeft.core.site import Site, Slot
from autopeft.methods._bottleneck import bottleneck_size
from autopeft.methods._host import new_parameter
from autopeft.methods._parallel import (
    LayerNormAt,
    ParallelBottleneck,
    Reads,
    branch_gains,
    branch_sizes,
    check_dropout,
    check_scale,
    kaiming,
)
from autopeft.methods._sizes import check_size
from autopeft.methods._traits import ChoosesNothing

__all__ = ["AdaptFormer", "AdaptFormerAdapter"]


@dataclass(frozen=True, slots=True)
class AdaptFormer(ChoosesNothing):
    """`mlp(norm(x)) + s (U relu(D x + d) + u)`: a bottleneck parallel to a transformer block's MLP.

    Chen et al., 2022, arXiv 2205.13535. It cannot be merged. Sizes are bottleneck widths h.
    LayerScale and stochastic depth, where a block has them, act on the sum: a small LayerScale damps the adapter,
    which a learned scale makes up for.

    Attributes:
        scale: s, 0.1 in the paper; `learned` trains it from 1.
        reads: `stream` feeds x as it is, as the released code does; `norm` feeds `norm(x)`, as the paper writes.
        layer_norm: `in` gives the adapter a LayerNorm of its own, 2 C parameters more.
        dropout: share of the hidden values that training drops.
    """

    scale: float | Literal["learned"] = 0.1
    reads: Reads = "stream"
    layer_norm: LayerNormAt = "none"
    dropout: float = 0.1

    family: ClassVar[str] = "adapter"

    def __post_init__(self) -> None:
        if self.scale != "learned":
            check_scale("adaptformer", self.scale)
        check_dropout("adaptformer", self.dropout)

    def slots(self, site: Site) -> tuple[Slot, ...]:
        """`output` of an MLP that is a residual branch."""
        return ("output",) if self.sizes(site) else ()

    def sizes(self, site: Site) -> tuple[int, ...]:
        """Powers of two up to half of the channels."""
        return branch_sizes(site, ("mlp",))

    def cost(self, site: Site, size: int) -> Cost:
        """`2 C h + h + C`, 1 for a learned scale and `2 C` for a LayerNorm.

        Added parameters count as entries, since no tensor of the model can hold them.
        """
        h = check_size("adaptformer", site, size, self.sizes(site))
        learned, normed = self.scale == "learned", self.layer_norm == "in"
        n = bottleneck_size(site.out_features, h) + learned + 2 * site.out_features * normed
        return Cost.plain(n, entries=n, tensors=4 + learned + 2 * normed)

    def mergeable(self, site: Site) -> bool:
        """No: a bottleneck is not linear in its input."""
        return False

    def build(self, site: Site, option: Option, host: nn.Module, generator: torch.Generator) -> AdaptFormerAdapter:
        """D drawn from the Kaiming uniform distribution of a Linear layer, U and the biases zero: an identity."""
        h = check_size("adaptformer", site, option.size, self.sizes(site))
        return AdaptFormerAdapter(self, site, host, h, generator)

    def gains(self, site: Site, evidence: Evidence, sizes: Sequence[int]) -> tuple[float, ...]:
        """A proxy: 1/4 of the h largest squared singular values of the block's `sum over tokens of dL/dy y^T`.

        The gradient at the branch's output is the one at the block's; the stream in front of the MLP stands in for y,
        which differs from it by the MLP alone. The scale is left out: it changes the size of a step. Without such
        evidence the gain is 0.
        """
        return branch_gains(evidence, sizes)


class AdaptFormerAdapter(ParallelBottleneck):
    """As the base class says, with `down_weight` D (h, C) and `up_weight` U (C, h)."""

    def __init__(
        self, method: AdaptFormer, site: Site, host: nn.Module, width: int, generator: torch.Generator
    ) -> None:
        super().__init__(
            site,
            host,
            width,
            reads=method.reads,
            layer_norm=method.layer_norm,
            activation="relu",
            dropout=method.dropout,
            scale=None if method.scale == "learned" else method.scale,
        )
        self.down_weight = new_parameter(host, kaiming(width, site.out_features, generator))
        self.up_weight = new_parameter(host, torch.zeros(site.out_features, width))

    def matrices(self) -> tuple[Tensor, Tensor]:
        """The parameters."""
        return self.down_weight, self.up_weight
