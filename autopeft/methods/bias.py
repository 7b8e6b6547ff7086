"""Bias tuning."""

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
from autopeft.methods._dense import DenseAdapter
from autopeft.methods._single import SingleSize
from autopeft.methods._sizes import check_size
from autopeft.methods._spectrum import energy

__all__ = ["Bias"]


@dataclass(frozen=True, slots=True)
class Bias(SingleSize):
    """The bias of a Linear, convolution or norm, trained as `b + delta` (BitFit; Ben Zaken et al., 2021)."""

    family: ClassVar[str] = "vector"

    def slots(self, site: Site) -> tuple[Slot, ...]:
        """`bias` of every site that has one."""
        return ("bias",) if site.has_bias and "bias" in site.slots else ()

    def cost(self, site: Site, size: int) -> Cost:
        """One scalar per output feature."""
        check_size("bias", site, size, self.sizes(site))
        return Cost.plain(site.n_bias, entries=site.n_bias)

    def build(self, site: Site, option: Option, host: nn.Module, generator: torch.Generator) -> DenseAdapter:
        """Zero at the start; nothing is random."""
        check_size("bias", site, option.size, self.sizes(site))
        return DenseAdapter(site, host, ("bias",))

    def gains(self, site: Site, evidence: Evidence, sizes: Sequence[int]) -> tuple[float, ...]:
        """The energy of the bias's signal."""
        return (energy(evidence["bias"].signal),) * len(sizes)
