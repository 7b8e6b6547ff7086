"""LoLDU: the diagonal of a triangular factorisation of a weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from autopeft.core.budget import Cost
from autopeft.core.menu import Option
from autopeft.core.scores import Evidence
from autopeft.core.site import Site, Slot
from autopeft.errors import UsageError
from autopeft.methods._diagonal import DiagonalAdapter
from autopeft.methods._drawn import own_generator
from autopeft.methods._host import host_tensor, new_parameter
from autopeft.methods._ldu import ldu
from autopeft.methods._sizes import check_size, half_octaves
from autopeft.methods._traits import ChoosesNothing

__all__ = ["DiagonalStart", "LoLDU", "LoLDUAdapter"]

DiagonalStart = Literal["lu", "ones", "zeros", "constant", "normal", "uniform"]
"""Where the trained diagonal starts: at the weight's own, at a number, or at random numbers."""


@dataclass(frozen=True, slots=True)
class LoLDU(ChoosesNothing):
    """`W + s P L_r diag(z - z_0) U_r`, the first r atoms of `W = P L D U` with their diagonal z trained.

    Shi et al., 2024, arXiv 2410.13618; W absorbs the initial term, so that every start is an exact identity. L and U
    have unit diagonals and W is factored with partial pivoting. Factors and permutation are computed again from W by a
    rule that gives the same pivots everywhere (`_ldu`); they are not stored and cost nothing. A convolution's weight is
    flattened to (out, in / groups * kh * kw).

    Since z enters linearly, its start matters only to what pulls on z itself: weight decay pulls it to zero, that is,
    the change to `-P L diag(z_0) U`; with `zeros` it pulls towards W. Random starts are drawn from `seed` and the
    site's name, so that they are known again when a plan is loaded.

    Attributes:
        start: `lu` (the weight's own diagonal, the paper's), `ones`, `zeros`, `constant` (0.01), `normal` (standard
            deviation 0.01) or `uniform` (from 0 to 1).
        alpha: numerator of the scale `s = alpha / r`; None means `alpha = r`, a scale of 1 at every size.
        train_scale: train s as well, one more parameter. The released code declares s a parameter and leaves it out of
            what is optimised.
        seed: seed of the random starts.
    """

    start: DiagonalStart = "lu"
    alpha: float | None = None
    train_scale: bool = False
    seed: int = 0

    family: ClassVar[str] = "core"

    def __post_init__(self) -> None:
        if self.start not in get_args(DiagonalStart):
            raise UsageError(f"loldu: start must be one of {', '.join(get_args(DiagonalStart))}, got {self.start!r}")
        if self.alpha is not None and not (math.isfinite(self.alpha) and self.alpha > 0):
            raise UsageError(f"loldu: alpha must be a positive number or null (scale 1), got {self.alpha!r}")

    def slots(self, site: Site) -> tuple[Slot, ...]:
        """`weight` of a Linear or Conv2d."""
        return ("weight",) if self.sizes(site) else ()

    def sizes(self, site: Site) -> tuple[int, ...]:
        """1, 2, 3, 4, 6, 8, 12, ... and the smaller dimension."""
        if not site.is_matrix or "weight" not in site.slots:
            return ()
        return half_octaves(min(site.in_features, site.out_features))

    def cost(self, site: Site, size: int) -> Cost:
        """One scalar per atom, and one for a trained scale; changes every entry of the weight."""
        r = check_size("loldu", site, size, self.sizes(site))
        return Cost.plain(r + self.train_scale, entries=site.n_weight, tensors=1 + self.train_scale)

    def mergeable(self, site: Site) -> bool:
        """Yes: the change is one of the host's own tensors."""
        return True

    def build(self, site: Site, option: Option, host: nn.Module, generator: torch.Generator) -> LoLDUAdapter:
        """The diagonal at its start; the factors come from the host and nothing from the generator."""
        r = check_size("loldu", site, option.size, self.sizes(site))
        return LoLDUAdapter(site, host, r, self)

    def gains(self, site: Site, evidence: Evidence, sizes: Sequence[int]) -> tuple[float, ...]:
        """Squared norm of the signal's projection on the span of the first r atoms, for each size.

        The atoms are neither orthogonal nor of one length: with g the inner products of the signal with the atoms and
        `G = (L^T L) * (U U^T)` those of the atoms, the projection has squared norm `g^T G^-1 g`. One Cholesky factor of
        G gives all sizes at once. A trained scale moves along the atoms too and adds nothing.
        """
        known = evidence["weight"]
        rank = min(max(sizes), site.in_features, site.out_features)
        left, _, right = (t.double() for t in ldu(known.value, None, rank))
        right = right / torch.linalg.vector_norm(right, dim=1, keepdim=True)
        left = left / torch.linalg.vector_norm(left, dim=0, keepdim=True)
        signal = known.signal.detach().flatten(1).to(device="cpu", dtype=torch.float64)
        inner = (left * (signal @ right.T)).sum(0)
        gram = (left.T @ left) * (right @ right.T)
        gram.diagonal().add_(1e-10)
        along = torch.linalg.solve_triangular(torch.linalg.cholesky(gram), inner[:, None], upper=False)[:, 0]
        held = along.square().cumsum(0)
        return tuple(float(held[min(size, rank) - 1]) for size in sizes)


class LoLDUAdapter(DiagonalAdapter):
    """`z` (r,), and `scale` () where it is trained; `start` (r,) holds `s_0 z_0` and is not saved."""

    start: Tensor

    def __init__(self, site: Site, host: nn.Module, rank: int, method: LoLDU) -> None:
        super().__init__(site, host, rank)
        left, diagonal, right = ldu(host_tensor(site, host, site.parameter), site.rows, rank)
        self.z = new_parameter(host, _start_of(method, site.name, diagonal))
        scale = 1.0 if method.alpha is None else method.alpha / rank
        self.scale: float | nn.Parameter = new_parameter(host, torch.tensor(scale)) if method.train_scale else scale
        self.register_buffer("start", (self.scale * self.z).detach().clone(), persistent=False)
        self.keep_bases(self.z, left, right)

    def change(self) -> Tensor:
        """`s z - s_0 z_0`."""
        return self.scale * self.z - self.start


def _start_of(method: LoLDU, name: str, diagonal: Tensor) -> Tensor:
    """z_0, float32."""
    if method.start == "lu":
        return diagonal.clone()
    if method.start in ("ones", "zeros", "constant"):
        return torch.full_like(diagonal, {"ones": 1.0, "zeros": 0.0, "constant": 0.01}[method.start])
    generator = own_generator(method.seed, name)
    if method.start == "normal":
        return 0.01 * torch.randn(diagonal.shape, generator=generator)
    return torch.rand(diagonal.shape, generator=generator)
