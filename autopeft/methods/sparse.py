"""Sparse tuning: chosen entries of a tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from autopeft.core.budget import Cost
from autopeft.core.menu import Indices, Option
from autopeft.core.scores import Evidence
from autopeft.core.site import Site
from autopeft.errors import UsageError
from autopeft.methods._axis import along
from autopeft.methods._chosen import best_entries
from autopeft.methods._host import is_plain, new_parameter
from autopeft.methods._sizes import check_size
from autopeft.methods._sparse import SparseConv, SparseLinear, compressible
from autopeft.methods._spectrum import captured
from autopeft.methods._traits import EntrySized
from autopeft.methods.base import Adapter, Role

__all__ = ["Sparse", "SparseAdapter", "SparseSlot"]

SparseSlot = Literal["weight", "bias"]
"""Which tensor of a site the entries are taken from."""


@dataclass(frozen=True, slots=True)
class Sparse(EntrySized):
    """`W + S`, S zero but for n trained values at fixed positions.

    SPT's unstructured part (He et al., 2023, arXiv 2303.08566, section 3.2). State and gradients take n numbers; an
    int32 position is stored beside each value.

    Attributes:
        slot: `weight` or `bias`.
    """

    slot: SparseSlot = "weight"

    family: ClassVar[str] = "entries"

    def __post_init__(self) -> None:
        if self.slot not in get_args(SparseSlot):
            raise UsageError(f"sparse: slot must be one of {', '.join(get_args(SparseSlot))}, got {self.slot!r}")

    def cost(self, site: Site, size: int) -> Cost:
        """Per entry a value of 32 bits, and a position of 32 bits that is stored and not trained."""
        n = check_size("sparse", site, size, self.sizes(site))
        return Cost(trainable=n, stored=2 * n, bits=64 * n, entries=n, tensors=2)

    def build(self, site: Site, option: Option, host: nn.Module, generator: torch.Generator) -> SparseAdapter:
        """Zero at the start; nothing is random.

        Raises:
            UsageError: when the option does not say which entries, or an entry lies outside of the tensor.
        """
        n = check_size("sparse", site, option.size, self.sizes(site))
        if option.indices is None:
            raise UsageError(
                f"option {option.key} does not say which {n} entries it trains; choose them with `select` (from the "
                f"scores' evidence) before the plan is inserted"
            )
        index = torch.from_numpy(option.indices.values.copy())
        if len(index) != n or int(index[-1]) >= self._n(site):
            raise UsageError(
                f"option {option.key} trains {n} of {self._n(site):,} entries, but its {len(index)} positions go up "
                f"to {int(index[-1]):,}; they belong to another tensor"
            )
        return SparseAdapter(site, host, self.slot, index)

    def gains(self, site: Site, evidence: Evidence, sizes: Sequence[int]) -> tuple[float, ...]:
        """The signal's energy at the entries that `select` would choose, for each size."""
        known = evidence[self.slot]
        chosen = best_entries(known.score, max(sizes))
        score = known.score.detach().to("cpu").flatten().abs()[chosen]
        best_first = chosen[torch.sort(score, descending=True, stable=True).indices]
        return captured(known.signal.detach().to("cpu").flatten()[best_first].double().square(), sizes)

    def mergeable(self, site: Site) -> bool:
        """Yes: the change is one of the host's own tensors."""
        return True

    def select(self, site: Site, evidence: Evidence, size: int) -> Indices | None:
        """The `size` entries with the largest score, the first ones among equals."""
        n = check_size("sparse", site, size, self.sizes(site))
        return Indices(best_entries(evidence[self.slot].score, n).numpy())


class SparseAdapter(Adapter):
    """`values` (n,), and `index` (n,): their flat positions in the site's tensor, int32, saved but not trained.

    Args:
        site: where.
        host: the module.
        slot: which tensor.
        index: the positions, increasing.
        saved: whether the positions are saved; not needed where they can be found again from the host.
    """

    rate_roles: ClassVar[Mapping[str, Role]] = {"values": "entries"}

    index: Tensor
    row_of: Tensor
    col_of: Tensor
    rows: Tensor
    columns: Tensor

    def __init__(self, site: Site, host: nn.Module, slot: SparseSlot, index: Tensor, saved: bool = True) -> None:
        conv = host if isinstance(host, nn.Conv2d) else None
        plain = is_plain(host) and not (slot == "weight" and conv is not None and isinstance(conv.padding, str))
        super().__init__(site, (slot,), "branch" if plain else "swap")
        self.values = new_parameter(host, torch.zeros(len(index)))
        device = self.values.device
        self.register_buffer("index", index.to(device, torch.int32), persistent=saved)
        self._shape = (site.out_features,) if slot == "bias" else site.shape
        self._pointwise = site.kind == "linear"
        if conv is not None:
            self._geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
            self._pointwise = self._geometry == ((1, 1), (0, 0), conv.dilation, 1) and conv.kernel_size == (1, 1)
        if plain and slot == "weight" and self._pointwise:
            rows, row_of = _touched(index // site.in_features, site.out_features)
            columns, col_of = _touched(index % site.in_features, site.in_features)
            for name, tensor in (("rows", rows), ("row_of", row_of), ("columns", columns), ("col_of", col_of)):
                self.register_buffer(name, tensor.to(device), persistent=False)

    def branch(self, x: Tensor) -> Tensor:
        """What the chosen entries add."""
        axis = self.site.channel_axis
        if self.slots == ("bias",):
            return along(self._dense(), x.ndim, axis)
        if not self._pointwise:
            conv: Tensor = SparseConv.apply(x, self.entries(), self.index.long(), self._shape, *self._geometry)
            return conv
        last = x.movedim(axis, -1)
        values, row_of, count = self.entries(), self.row_of, len(self.rows)
        if count < self.site.out_features and compressible(last, values):
            # A compressed product writes the rows without an entry as well: no copy of the others into them.
            row_of, count = self.rows[row_of], self.site.out_features
        touched = SparseLinear.apply(last, values, row_of, self.col_of, count, self.columns)
        if count < self.site.out_features:
            full = touched.new_zeros(*touched.shape[:-1], self.site.out_features)
            touched = full.index_copy_(-1, self.rows, touched)
        added: Tensor = touched.movedim(-1, axis)
        return added

    def delta(self) -> dict[str, Tensor]:
        """The dense tensor that is zero but for the values."""
        return {self.slots[0]: self._dense()}

    def entries(self) -> Tensor:
        """The values as they act, (n,)."""
        return self.values

    def _dense(self) -> Tensor:
        flat = self.values.new_zeros(torch.Size(self._shape).numel())
        return flat.index_put((self.index.long(),), self.entries()).view(self._shape)


def _touched(places: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Which of n rows (columns) are touched, and the number of each entry's among them.

    Where it is over a quarter of them, all are, which saves a copy of what they are taken from or put into.
    """
    touched, number = torch.unique(places, return_inverse=True)
    return (torch.arange(n), places) if 4 * len(touched) > n else (touched, number)
