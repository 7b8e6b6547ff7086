"""Core: a small trained matrix between frozen singular bases of the weight."""

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
from autopeft.methods._bases import LARGEST_RANK, top_singular
from autopeft.methods._host import host_tensor, is_plain, new_parameter
from autopeft.methods._low_rank import LowRankAdapter
from autopeft.methods._sizes import check_size
from autopeft.methods._traits import ChoosesNothing

__all__ = ["Core", "CoreAdapter"]

_SIZES = (*range(1, 17), 18, 20, 24, 28, 32, 40, 48, 56, LARGEST_RANK)
"""Fine where a 0.1 % budget spreads over every matrix, coarse where a few matrices get it all."""


@dataclass(frozen=True, slots=True)
class Core(ChoosesNothing):
    """`W + U_r M V_r^T` with M (r, r) trained from zero and U_r, V_r the first singular vectors of W, frozen.

    LoRA-XS (Balazy et al., 2024, arXiv 2405.17604, equation 2) without the singular values, so that M is measured in
    the units of W. It costs r^2 where LoRA costs r (in + out), so a small budget reaches every matrix. The bases are
    computed again from W when a plan is loaded and are not stored. A convolution's weight is flattened to
    (out, in / groups * kh * kw).
    """

    family: ClassVar[str] = "core"

    def slots(self, site: Site) -> tuple[Slot, ...]:
        """`weight` of a Linear or Conv2d."""
        return ("weight",) if self.sizes(site) else ()

    def sizes(self, site: Site) -> tuple[int, ...]:
        """1 to 16, then 18, 20, 24, 28, 32, 40, 48, 56, 64, as far as the smaller dimension goes."""
        if not site.is_matrix or "weight" not in site.slots:
            return ()
        largest = min(site.in_features, site.out_features)
        return tuple(r for r in _SIZES if r <= largest)

    def cost(self, site: Site, size: int) -> Cost:
        """`r^2`; changes every entry of the weight."""
        r = check_size("core", site, size, self.sizes(site))
        return Cost.plain(r * r, entries=site.n_weight)

    def build(self, site: Site, option: Option, host: nn.Module, generator: torch.Generator) -> CoreAdapter:
        """M zero; the bases come from the host's weight and nothing is random."""
        r = check_size("core", site, option.size, self.sizes(site))
        return CoreAdapter(site, host, r)

    def gains(self, site: Site, evidence: Evidence, sizes: Sequence[int]) -> tuple[float, ...]:
        """Squared Frobenius norm of `U_r^T S V_r`, S the signal: the energy of M's own gradient at step 0."""
        known = evidence["weight"]
        rank = min(max(sizes), site.in_features, site.out_features, LARGEST_RANK)
        u, v = top_singular(known.value, None, rank)
        signal = known.signal.detach().flatten(1).to(device="cpu", dtype=torch.float32)
        square = (u.T @ signal @ v).double().square()
        total = square.cumsum(0).cumsum(1).diagonal()
        return tuple(float(total[min(size, rank) - 1]) for size in sizes)

    def mergeable(self, site: Site) -> bool:
        """Yes: the change is one of the host's own tensors."""
        return True


class CoreAdapter(LowRankAdapter):
    """The core `M` (r, r); bases `U` (out_features, r) and `V` (in_features, r) as buffers that are not saved."""

    U: Tensor
    V: Tensor

    def __init__(self, site: Site, host: nn.Module, rank: int) -> None:
        super().__init__(site, "branch" if is_plain(host) else "swap")
        self.M = new_parameter(host, torch.zeros(rank, rank))
        u, v = top_singular(host_tensor(site, host, site.parameter), site.rows, rank)
        self.register_buffer("U", u.to(self.M, copy=True), persistent=False)
        self.register_buffer("V", v.to(self.M, copy=True), persistent=False)
        self.keep_geometry(host)

    def branch(self, x: Tensor) -> Tensor:
        """As the base class says, at rank r in both products."""
        # M joins the small side, so that both products stay rank r: U (M (V^T x)).
        return self.expand(self.contract(x, self.M @ self.V.T), self.U)

    def delta(self) -> dict[str, Tensor]:
        """`U M V^T` as a tensor of the site's shape."""
        return {"weight": (self.U @ self.M @ self.V.T).view(self.site.shape)}

    def low_rank(self) -> tuple[Tensor, Tensor]:
        """`(V^T, U M)`."""
        return self.V.T.clone(), self.U @ self.M.detach()
