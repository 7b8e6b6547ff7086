"""Tuning of a scale alone."""

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

__all__ = ["Vector"]


@dataclass(frozen=True, slots=True)
class Vector(SingleSize):
    """The scale of a norm or of a LayerScale, trained as `w + delta`, without the norm's bias.

    Together with `Bias` it splits what `Norm` buys as one, so that a plan can take either half.
    """

    family: ClassVar[str] = "vector"

    def slots(self, site: Site) -> tuple[Slot, ...]:
        """`weight` of every site whose weight is a vector."""
        fits = site.kind in ("layer_norm", "batch_norm", "layer_scale") and len(site.shape) == 1
        return ("weight",) if fits and "weight" in site.slots else ()

    def cost(self, site: Site, size: int) -> Cost:
        """One scalar per channel."""
        check_size("vector", site, size, self.sizes(site))
        return Cost.plain(site.n_weight, entries=site.n_weight)

    def build(self, site: Site, option: Option, host: nn.Module, generator: torch.Generator) -> DenseAdapter:
        """Zero at the start; nothing is random."""
        check_size("vector", site, option.size, self.sizes(site))
        return DenseAdapter(site, host, ("weight",))

    def gains(self, site: Site, evidence: Evidence, sizes: Sequence[int]) -> tuple[float, ...]:
        """The energy of the scale's signal."""
        return (energy(evidence["weight"].signal),) * len(sizes)
