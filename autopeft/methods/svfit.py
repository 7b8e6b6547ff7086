"""SVFit: the largest singular values of a weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from autopeft.core.budget import Cost
from autopeft.core.menu import Option
from autopeft.core.scores import Evidence
from autopeft.core.site import Site, Slot
from autopeft.errors import UsageError
from autopeft.methods._bases import LARGEST_RANK, all_singular, top_singular
from autopeft.methods._diagonal import DiagonalAdapter, diagonal_energies
from autopeft.methods._host import host_tensor, new_parameter
from autopeft.methods._sizes import check_size, half_octaves
from autopeft.methods._spectrum import captured
from autopeft.methods._traits import ChoosesNothing

__all__ = ["SVFit", "SVFitAdapter"]


@dataclass(frozen=True, slots=True)
class SVFit(ChoosesNothing):
    """`U_r diag(sigma) V_r^T + W_e`: the r largest singular values are trained, the rest of W is frozen.

    Sun et al., 2024, arXiv 2409.05926. What is trained is `sigma - sigma_0`, from zero: an exact identity at the start,
    and the same training but for weight decay, which pulls towards W. The bases are computed again from W when a plan
    is loaded and are not stored. A convolution's weight is flattened to (out, in / groups * kh * kw).

    Attributes:
        energy: the paper takes the smallest r whose singular values hold a share (99 %) of the sum of their squares.
            With a share given, ranks beyond that r are predicted to gain nothing, so that no plan pays for them; they
            can still be asked for. None leaves the rank to the evidence alone.
    """

    energy: float | None = None

    family: ClassVar[str] = "core"

    def __post_init__(self) -> None:
        if self.energy is not None and not 0 < self.energy <= 1:
            raise UsageError(
                f"svfit: energy must be a share of the squared singular values, above 0 and at most 1, or null for no "
                f"limit, got {self.energy!r}"
            )

    def slots(self, site: Site) -> tuple[Slot, ...]:
        """`weight` of a Linear or Conv2d."""
        return ("weight",) if self.sizes(site) else ()

    def sizes(self, site: Site) -> tuple[int, ...]:
        """1, 2, 3, 4, 6, 8, 12, ... and the number of singular values."""
        if not site.is_matrix or "weight" not in site.slots:
            return ()
        return half_octaves(min(site.in_features, site.out_features))

    def cost(self, site: Site, size: int) -> Cost:
        """One scalar per singular value; changes every entry of the weight."""
        r = check_size("svfit", site, size, self.sizes(site))
        return Cost.plain(r, entries=site.n_weight)

    def mergeable(self, site: Site) -> bool:
        """Yes: the change is one of the host's own tensors."""
        return True

    def build(self, site: Site, option: Option, host: nn.Module, generator: torch.Generator) -> SVFitAdapter:
        """The change zero; the bases come from the host's weight and nothing is random."""
        r = check_size("svfit", site, option.size, self.sizes(site))
        return SVFitAdapter(site, host, r)

    def gains(self, site: Site, evidence: Evidence, sizes: Sequence[int]) -> tuple[float, ...]:
        """Sum of `(u_i^T S v_i)^2` over the r largest singular values, S the signal: the gradient's own energy."""
        known = evidence["weight"]
        if self.energy is None and max(sizes) <= LARGEST_RANK:
            u, v = top_singular(known.value, None, min(max(sizes), site.in_features, site.out_features))
            limit = max(sizes)
        else:
            u, values, v = all_singular(known.value, None)
            limit = len(values) if self.energy is None else _rank_of_share(values, self.energy)
        energies = diagonal_energies(known.signal, u, v, sizes)
        return captured(energies, [min(size, limit) for size in sizes])


class SVFitAdapter(DiagonalAdapter):
    """`values` (r,): the change of the r largest singular values."""

    def __init__(self, site: Site, host: nn.Module, rank: int) -> None:
        super().__init__(site, host, rank)
        weight = host_tensor(site, host, site.parameter)
        self.values = new_parameter(host, torch.zeros(rank))
        if rank <= LARGEST_RANK:
            u, v = top_singular(weight, site.rows, rank)
            self.recomputed = frozenset({"left", "right"})
        else:
            u, _, v = all_singular(weight, site.rows)
        self.keep_bases(self.values, u[:, :rank], v[:, :rank].T)

    def change(self) -> Tensor:
        """The parameter itself."""
        return self.values


def _rank_of_share(values: Tensor, share: float) -> int:
    """The smallest number of leading values whose squares hold the share of all squares; at least 1."""
    held = values.double().square().cumsum(0)
    enough = share * float(held[-1]) * (1 - 1e-12)
    return min(int((held < enough).sum()) + 1, len(values))
