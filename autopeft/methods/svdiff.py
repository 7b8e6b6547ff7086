"""SVDiff: every singular value of a weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autopeft.core.budget import Cost
from autopeft.core.menu import Option
from autopeft.core.scores import Evidence
from autopeft.core.site import Site, Slot
from autopeft.methods._bases import all_singular
from autopeft.methods._diagonal import DiagonalAdapter, diagonal_energies
from autopeft.methods._host import host_tensor, new_parameter
from autopeft.methods._single import SingleSize
from autopeft.methods._sizes import check_size

__all__ = ["SVDiff", "SVDiffAdapter"]


@dataclass(frozen=True, slots=True)
class SVDiff(SingleSize):
    """`U diag(relu(s + delta)) V^T` with the spectral shift delta trained from zero.

    Han et al., 2023, arXiv 2303.11305. The rectifier keeps singular values from turning negative; one that is zero (up
    to float32's rounding of the largest) has no gradient and stays zero. Only Linear and convolution weights are
    shifted; a convolution's is flattened to (out, in / groups * kh * kw). The bases are computed again from W and are
    not stored.
    """

    family: ClassVar[str] = "core"

    def slots(self, site: Site) -> tuple[Slot, ...]:
        """`weight` of a Linear or Conv2d."""
        return ("weight",) if site.is_matrix and "weight" in site.slots else ()

    def cost(self, site: Site, size: int) -> Cost:
        """One scalar per singular value, `min(out, in)`; changes every entry of the weight."""
        check_size("svdiff", site, size, self.sizes(site))
        return Cost.plain(min(site.in_features, site.out_features), entries=site.n_weight)

    def build(self, site: Site, option: Option, host: nn.Module, generator: torch.Generator) -> SVDiffAdapter:
        """The shift zero; the bases come from the host's weight and nothing is random."""
        check_size("svdiff", site, option.size, self.sizes(site))
        return SVDiffAdapter(site, host)

    def gains(self, site: Site, evidence: Evidence, sizes: Sequence[int]) -> tuple[float, ...]:
        """Sum of `(u_i^T S v_i)^2` over the singular values above zero, S the signal: the gradient's own energy."""
        known = evidence["weight"]
        u, values, v = all_singular(known.value, None)
        energies = diagonal_energies(known.signal, u, v, (len(values),))
        return (float(energies[_clean(values) > 0].sum()),) * len(sizes)


class SVDiffAdapter(DiagonalAdapter):
    """`shift` (m,), m = min(out, in): the spectral shift; `singular` (m,): the singular values, not saved."""

    singular: Tensor

    def __init__(self, site: Site, host: nn.Module) -> None:
        super().__init__(site, host, min(site.in_features, site.out_features))
        u, values, v = all_singular(host_tensor(site, host, site.parameter), site.rows)
        self.shift = new_parameter(host, torch.zeros(len(values)))
        self.register_buffer("singular", _clean(values).to(self.shift), persistent=False)
        self.keep_bases(self.shift, u, v.T)

    def change(self) -> Tensor:
        """`relu(s + delta) - s`."""
        return F.relu(self.singular + self.shift) - self.singular


def _clean(values: Tensor) -> Tensor:
    """Singular values; rounding alone becomes exactly zero, so that every machine trains the same ones."""
    return torch.where(values > torch.finfo(torch.float32).eps * values[0], values, 0.0)
