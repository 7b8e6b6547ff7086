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
    to float32's rounding of the largest) has no gradient and stays zero. A convolution's weight is flattened to
    (out, in / groups * kh * kw). The bases are computed again from W and are not stored.

    Attributes:
        norms: also shift the scale of norms, as the released code does: a vector is a matrix of one column, whose
            single singular value is its length.
    """

    norms: bool = False

    family: ClassVar[str] = "core"

    def slots(self, site: Site) -> tuple[Slot, ...]:
        """`weight` of a Linear or Conv2d, and of a norm with `norms`."""
        fits = site.is_matrix or (self.norms and site.kind in ("layer_norm", "batch_norm") and len(site.shape) == 1)
        return ("weight",) if fits and "weight" in site.slots else ()

    def cost(self, site: Site, size: int) -> Cost:
        """One scalar per singular value, `min(out, in)`, which is 1 for a norm; changes every entry of the weight."""
        check_size("svdiff", site, size, self.sizes(site))
        return Cost.plain(min(site.in_features, site.out_features), entries=site.n_weight)

    def build(self, site: Site, option: Option, host: nn.Module, generator: torch.Generator) -> SVDiffAdapter:
        """The shift zero; the bases come from the host's weight and nothing is random."""
        check_size("svdiff", site, option.size, self.sizes(site))
        return SVDiffAdapter(site, host)

    def gains(self, site: Site, evidence: Evidence, sizes: Sequence[int]) -> tuple[float, ...]:
        """Sum of `(u_i^T S v_i)^2` over the singular values above zero, S the signal: the gradient's own energy."""
        known = evidence["weight"]
        u, values, v = _triples(site, known.value)
        energies = diagonal_energies(known.signal.reshape(site.out_features, -1), u, v, (len(values),))
        return (float(energies[_clean(values) > 0].sum()),) * len(sizes)


class SVDiffAdapter(DiagonalAdapter):
    """`shift` (m,), m = min(out, in): the spectral shift; `singular` (m,): the singular values, not saved."""

    singular: Tensor

    def __init__(self, site: Site, host: nn.Module) -> None:
        super().__init__(site, host, min(site.in_features, site.out_features))
        u, values, v = _triples(site, host_tensor(site, host, site.parameter), site.rows)
        self.shift = new_parameter(host, torch.zeros(len(values)))
        self.register_buffer("singular", _clean(values).to(self.shift), persistent=False)
        self.keep_bases(self.shift, u, v.T)

    def change(self) -> Tensor:
        """`relu(s + delta) - s`."""
        return F.relu(self.singular + self.shift) - self.singular

    def low_rank(self) -> tuple[Tensor, Tensor] | None:
        """As the base class says; None on a norm, whose weight is no matrix to anybody else."""
        return DiagonalAdapter.low_rank(self) if self.site.is_matrix else None


def _triples(site: Site, tensor: Tensor, rows: tuple[int, int] | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Singular triples of a weight; of a vector w they are `w / |w|`, `|w|` and 1."""
    if site.is_matrix:
        return all_singular(tensor, rows)
    vector = tensor.detach().to(device="cpu", dtype=torch.float64)
    length = torch.linalg.vector_norm(vector)
    u = vector / length.clamp_min(torch.finfo(torch.float64).tiny)
    return u.float()[:, None], length.float()[None], torch.ones(1, 1)


def _clean(values: Tensor) -> Tensor:
    """Singular values; rounding alone becomes exactly zero, so that every machine trains the same ones."""
    return torch.where(values > torch.finfo(torch.float32).eps * values[0], values, 0.0)
