"""Tuning of class tokens, register tokens and position embeddings."""

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

__all__ = ["Tokens"]


@dataclass(frozen=True, slots=True)
class Tokens(SingleSize):
    """A parameter that the model adds to or puts beside its patch tokens, trained as `t + delta`."""

    family: ClassVar[str] = "tokens"

    def slots(self, site: Site) -> tuple[Slot, ...]:
        """`tokens` of a token site."""
        return ("tokens",) if site.kind == "tokens" and "tokens" in site.slots else ()

    def cost(self, site: Site, size: int) -> Cost:
        """Every entry of the tensor."""
        check_size("tokens", site, size, self.sizes(site))
        return Cost.plain(site.n_weight, entries=site.n_weight)

    def build(self, site: Site, option: Option, host: nn.Module, generator: torch.Generator) -> DenseAdapter:
        """Zero at the start; nothing is random."""
        check_size("tokens", site, option.size, self.sizes(site))
        return DenseAdapter(site, host, ("tokens",))

    def gains(self, site: Site, evidence: Evidence, sizes: Sequence[int]) -> tuple[float, ...]:
        """The energy of the tokens' signal."""
        return (energy(evidence["tokens"].signal),) * len(sizes)
