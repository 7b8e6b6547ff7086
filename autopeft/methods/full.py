"""Full fine-tuning of a site: every entry of its tensors."""

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

_KINDS = ("linear", "conv2d", "layer_norm", "batch_norm", "layer_scale", "tokens")


@dataclass(frozen=True, slots=True)
class Full(SingleSize):
    """Every entry of a site's tensors, trained as `w + delta` from zero.

    On the attention modules of a U-Net it is attention tuning, on every site full fine-tuning, the ceiling. Without
    weight decay training takes the same steps as on the tensors themselves; decay pulls towards the pre-trained values
    (L2-SP; Li et al., 2018, arXiv 1802.01483).
    """

    family: ClassVar[str] = "dense"

    def slots(self, site: Site) -> tuple[Slot, ...]:
        """`weight` and `bias`, or `tokens`, as far as the site has them; nothing of blocks, branches and groups."""
        if site.kind not in _KINDS:
            return ()
        if site.kind == "tokens":
            return ("tokens",) if "tokens" in site.slots else ()
        if "weight" not in site.slots:
            return ()
        return ("weight", "bias") if site.has_bias and "bias" in site.slots else ("weight",)

    def cost(self, site: Site, size: int) -> Cost:
        """Every entry of the tensors."""
        check_size("full", site, size, self.sizes(site))
        slots = self.slots(site)
        n = site.n_weight + (site.n_bias if "bias" in slots else 0)
        return Cost.plain(n, entries=n, tensors=len(slots))

    def build(self, site: Site, option: Option, host: nn.Module, generator: torch.Generator) -> FullAdapter:
        """Zero at the start; nothing is random."""
        check_size("full", site, option.size, self.sizes(site))
        return FullAdapter(site, host, self.slots(site))

    def gains(self, site: Site, evidence: Evidence, sizes: Sequence[int]) -> tuple[float, ...]:
        """The energy of every signal."""
        return (sum(energy(evidence[slot].signal) for slot in self.slots(site)),) * len(sizes)


class FullAdapter(DenseAdapter):
    """The changes, of which that of a matrix follows the rules of learning rates for whole weights."""

    @property
    def rate_roles(self) -> Mapping[str, Role]:  # type: ignore[override]  # depends on the site
        """A matrix is `dense`; norms, biases and tokens are vectors."""
        return MappingProxyType({"weight": "dense"} if self.site.is_matrix else {})
