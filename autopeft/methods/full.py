"""Full fine-tuning of a site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import nn

from autopeft.core.budget import Cost
from autopeft.core.menu import Option
from autopeft.core.scores import Evidence
from autopeft.core.site import Site, Slot
from autopeft.methods._dense import DenseAdapter
from autopeft.methods._single import SingleSize
from autopeft.methods._sizes import check_size
from autopeft.methods._spectrum import energy
from autopeft.methods.base import Role

__all__ = ["Full", "FullAdapter"]


@dataclass(frozen=True, slots=True)
class Full(SingleSize):
    """Every entry of a site's weight and bias, trained as `W + D` and `b + d` from zero.

    On the attention modules of a U-Net it is attention tuning, on every site full fine-tuning: the two baselines that a
    masked plan is compared with. Without weight decay training takes the same steps as on the tensors themselves; decay
    pulls towards the pre-trained values.
    """

    family: ClassVar[str] = "entries"

    def slots(self, site: Site) -> tuple[Slot, ...]:
        """`weight` and, where there is one, `bias` of a Linear, a convolution or a norm."""
        if not (site.is_matrix or site.kind in ("layer_norm", "batch_norm")) or "weight" not in site.slots:
            return ()
        return ("weight", "bias") if site.has_bias and "bias" in site.slots else ("weight",)

    def cost(self, site: Site, size: int) -> Cost:
        """Every entry."""
        check_size("full", site, size, self.sizes(site))
        slots = self.slots(site)
        n = site.n_weight + site.n_bias * ("bias" in slots)
        return Cost.plain(n, entries=n, tensors=len(slots))

    def build(self, site: Site, option: Option, host: nn.Module, generator: torch.Generator) -> DenseAdapter:
        """Zero at the start; nothing is random."""
        check_size("full", site, option.size, self.sizes(site))
        return (FullAdapter if site.is_matrix else DenseAdapter)(site, host, self.slots(site))

    def gains(self, site: Site, evidence: Evidence, sizes: Sequence[int]) -> tuple[float, ...]:
        """The energy of the signals of weight and bias: an upper bound on what any other method captures there."""
        return (sum(energy(evidence[slot].signal) for slot in self.slots(site)),) * len(sizes)


class FullAdapter(DenseAdapter):
    """On a matrix: `weight` is a whole weight to the rules of learning rates, `bias` a vector."""

    rate_roles: ClassVar[Mapping[str, Role]] = MappingProxyType({"weight": "dense"})
