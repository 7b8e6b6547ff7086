"""SaRA: the entries of smallest magnitude, trained in two stretches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, get_args

import torch
from torch import Tensor, nn

from autopeft.core.budget import Cost
from autopeft.core.menu import Indices, Option
from autopeft.core.scores import Evidence
from autopeft.core.site import Site
from autopeft.errors import UsageError
from autopeft.methods._chosen import smallest_entries
from autopeft.methods._host import host_tensor, rows_of
from autopeft.methods._sizes import check_size
from autopeft.methods._spectrum import captured
from autopeft.methods._traits import EntrySized
from autopeft.methods.sparse import SparseAdapter, SparseSlot

__all__ = ["SaRA", "SaRAAdapter"]


@dataclass(frozen=True, slots=True)
class SaRA(EntrySized):
    """`W + S`, S zero but at the n entries of W that are smallest in magnitude.

    Hu et al., 2024, arXiv 2409.06633, sections 3.2 and 3.4: weights below a threshold do next to nothing in the
    pre-trained model, and can be given something to do without harm. Here the size n says how many, and the threshold
    is the smallest magnitude above theirs. After the part `switch` of training the entries that have grown over the
    threshold keep their values, those that are still below it go on with a fresh optimizer state.

    What is saved is n values: which entries they belong to follows from W. The paper trains the entry itself and this
    method its change, which is the same but for weight decay. The paper's nuclear norm of the change is the regulariser
    `nuclear_norm`, with `estimator: one, min_side: 65` as the authors released it. Their first step trains the
    magnitudes of the entries, without signs; that is not followed.

    Attributes:
        slot: `weight` or `bias`.
        switch: when, as a fraction of training; 0 or 1 for never. The authors switch halfway.
    """

    slot: SparseSlot = "weight"
    switch: float = 0.5

    family: ClassVar[str] = "entries"

    def __post_init__(self) -> None:
        if self.slot not in get_args(SparseSlot):
            raise UsageError(f"sara: slot must be one of {', '.join(get_args(SparseSlot))}, got {self.slot!r}")
        if not 0 <= self.switch <= 1:
            raise UsageError(f"sara: switch must be a fraction of training from 0 to 1, got {self.switch!r}")

    def cost(self, site: Site, size: int) -> Cost:
        """N values of 32 bits; their positions follow from the weight."""
        n = check_size("sara", site, size, self.sizes(site))
        return Cost.plain(n, entries=n)

    def mergeable(self, site: Site) -> bool:
        """Yes: the change is one of the host's own tensors."""
        return True

    def build(self, site: Site, option: Option, host: nn.Module, generator: torch.Generator) -> SaRAAdapter:
        """Zero at the start; nothing is random. The entries are found in the host, also where the option names them.

        Raises:
            UsageError: when the option names other entries: it was made for other weights.
        """
        n = check_size("sara", site, option.size, self.sizes(site))
        name = "bias" if self.slot == "bias" else site.parameter
        value = rows_of(site, host_tensor(site, host, name)).detach()
        index = smallest_entries(value, n)
        if option.indices is not None and option.indices.values.tolist() != index.tolist():
            raise UsageError(
                f"option {option.key} trains the {n} smallest entries, and they are not those that the plan names: the "
                f"plan was made for other weights"
            )
        return SaRAAdapter(site, host, self.slot, value, index, self.switch)

    def gains(self, site: Site, evidence: Evidence, sizes: Sequence[int]) -> tuple[float, ...]:
        """The signal's energy at the entries that are trained, for each size: the choice does not look at it."""
        known = evidence[self.slot]
        chosen = smallest_entries(known.value, max(sizes))
        magnitude = known.value.detach().to("cpu").flatten().abs()[chosen]
        smallest_first = chosen[torch.sort(magnitude, stable=True).indices]
        return captured(known.signal.detach().to("cpu").flatten()[smallest_first].double().square(), sizes)

    def select(self, site: Site, evidence: Evidence, size: int) -> Indices | None:
        """The `size` entries of smallest magnitude, the first ones among equals."""
        n = check_size("sara", site, size, self.sizes(site))
        return Indices(smallest_entries(evidence[self.slot].value, n).numpy())


class SaRAAdapter(SparseAdapter):
    """`values` (n,), the changes, and `active` (n,), which of them are still trained: a bool that training sets.

    `start` (n,), the entries themselves, and `threshold` () are read from the host; so are the positions.
    """

    moving: ClassVar[frozenset[str]] = frozenset({"active"})

    active: Tensor
    start: Tensor
    threshold: Tensor

    def __init__(
        self, site: Site, host: nn.Module, slot: SparseSlot, value: Tensor, index: Tensor, switch: float
    ) -> None:
        super().__init__(site, host, slot, index, saved=False)
        self._switch = switch
        device, dtype = self.values.device, self.values.dtype
        magnitudes = value.flatten().abs().to(device, dtype)
        start = value.flatten()[index.to(value.device)].to(device, dtype)
        # Above every chosen entry, also where the last chosen one is one of several equals.
        above = magnitudes[magnitudes > start.abs().max()]
        threshold = above.min() if above.numel() else torch.full((), torch.inf, device=device, dtype=dtype)
        self.register_buffer("start", start, persistent=False)
        self.register_buffer("threshold", threshold, persistent=False)
        self.register_buffer("active", torch.ones(len(index), dtype=torch.bool, device=device))

    def entries(self) -> Tensor:
        """The values; no gradient reaches those that are trained no more."""
        return torch.where(self.active, self.values, self.values.detach())

    @torch.no_grad()
    def advance(self, step: int, total: int) -> bool:
        """At the switch, entries at or over the threshold stop moving and the optimizer starts afresh."""
        if step == 0 or step != math.floor(self._switch * total):
            return False
        self.active &= (self.start + self.values).abs() < self.threshold
        return True

    def stored(self) -> dict[str, Tensor]:
        """The values: which are still trained is nothing to whoever uses them."""
        return {"values": self.values}

    def load_stored(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up the values.

        Raises:
            UsageError: for other tensors, or another number of values.
        """
        if set(tensors) != {"values"} or tensors["values"].shape != self.values.shape:
            raise UsageError(
                f"sara of {self.site.name} holds {len(self.values)} values; the file has "
                f"{', '.join(f'{n} {tuple(t.shape)}' for n, t in tensors.items())}"
            )
        with torch.no_grad():
            self.values.copy_(tensors["values"])
