"""Tuning of a norm's scale and bias."""

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

__all__ = ["Norm"]


@dataclass(frozen=True, slots=True)
class Norm(SingleSize):
    """Scale and bias of a LayerNorm or BatchNorm (LN-tuning; Zhao et al., 2023, arXiv 2312.11420).

    The running statistics of a BatchNorm are no parameters; whether they move is the backend's decision.
    """

    family: ClassVar[str] = "vector"

    def slots(self, site: Site) -> tuple[Slot, ...]:
        """`weight` and `bias` of a norm that has both."""
        fits = site.kind in ("layer_norm", "batch_norm") and site.has_bias
        return ("weight", "bias") if fits and {"weight", "bias"} <= set(site.slots) else ()

    def cost(self, site: Site, size: int) -> Cost:
        """Two scalars per channel."""
        check_size("norm", site, size, self.sizes(site))
        n = site.n_weight + site.n_bias
        return Cost.plain(n, entries=n, tensors=2)

    def build(self, site: Site, option: Option, host: nn.Module, generator: torch.Generator) -> DenseAdapter:
        """Zero at the start; nothing is random."""
        check_size("norm", site, option.size, self.sizes(site))
        return DenseAdapter(site, host, ("weight", "bias"))

    def gains(self, site: Site, evidence: Evidence, sizes: Sequence[int]) -> tuple[float, ...]:
        """The energy of both signals."""
        return (energy(evidence["weight"].signal) + energy(evidence["bias"].signal),) * len(sizes)
