"""What several methods answer alike: where they go, in which sizes, and that they choose no entries."""

from __future__ import annotations

from typing import Literal

from autopeft.core.menu import Indices
from autopeft.core.scores import Evidence
from autopeft.core.site import Site, Slot
from autopeft.methods._sizes import powers_of_two

__all__ = ["ChoosesNothing", "EntrySized", "LowRankSized"]


class ChoosesNothing:
    """A method that trains no chosen entries."""

    __slots__ = ()

    def select(self, site: Site, evidence: Evidence, size: int) -> Indices | None:
        """None: no entries are chosen."""
        return None


class LowRankSized(ChoosesNothing):
    """A method of two factors of a weight, as LoRA has them; its size is their rank."""

    __slots__ = ()

    def slots(self, site: Site) -> tuple[Slot, ...]:
        """`weight` of a Linear or Conv2d that is larger than its rank-1 factors."""
        return ("weight",) if self.sizes(site) else ()

    def sizes(self, site: Site) -> tuple[int, ...]:
        """Powers of two whose factors have fewer entries than the weight itself."""
        if not site.is_matrix or "weight" not in site.slots:
            return ()
        return powers_of_two((site.n_weight - 1) // (site.in_features + site.out_features))


class EntrySized:
    """A method of single entries of the tensor that its `slot` names; its size is their number."""

    __slots__ = ()

    slot: Literal["weight", "bias"]

    def slots(self, site: Site) -> tuple[Slot, ...]:
        """`weight` or `bias`, as the method is set, of a Linear, convolution, norm or LayerScale."""
        if site.kind in ("tokens", "block", "group", "residual") or self.slot not in site.slots:
            return ()
        return (self.slot,) if self._n(site) else ()

    def sizes(self, site: Site) -> tuple[int, ...]:
        """Powers of two, and all entries of the tensor."""
        if not self.slots(site):
            return ()
        return tuple(sorted({*powers_of_two(self._n(site)), self._n(site)}))

    def _n(self, site: Site) -> int:
        return site.n_bias if self.slot == "bias" else site.n_weight
