"""PEGO: a group of LoRAs kept orthogonal to the weight and to each other."""

from __future__ import annotations

import math
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
from autopeft.methods._host import host_tensor, new_parameter, rows_of
from autopeft.methods._l1 import L1OfProduct
from autopeft.methods._low_rank import LowRankAdapter
from autopeft.methods._sizes import check_size, powers_of_two
from autopeft.methods._spectrum import captured, squared_singular_values
from autopeft.methods._traits import ChoosesNothing

__all__ = ["PEGO", "PEGOAdapter"]


@dataclass(frozen=True, slots=True)
class PEGO(ChoosesNothing):
    """`W + sum of B_i A_i` over N members of rank r, with a penalty that keeps them apart.

    Hu et al., 2024, arXiv 2407.15085: to the loss is added, per weight, `strength` times

        sum over i of ||W (B_i A_i)^T||_1  +  sum over i < j of ||(B_i A_i) (B_j A_j)^T||_1

    with entrywise norms: the first keeps what was learnt in pre-training, the second makes the members differ. A
    convolution's weight is flattened to (out, in / groups * kh * kw); with groups, every group shares the A's. The
    paper trains the query and value slices of a ViT.

    Attributes:
        members: N, at least 1.
        strength: weight of the penalty; 0 for none.
    """

    members: int = 4
    strength: float = 1e-3

    family: ClassVar[str] = "matrix"

    def __post_init__(self) -> None:
        if self.members < 1:
            raise UsageError(f"pego: members must be at least 1, got {self.members!r}")
        if not (math.isfinite(self.strength) and self.strength >= 0):
            raise UsageError(f"pego: strength must be a number of at least 0, got {self.strength!r}")

    def slots(self, site: Site) -> tuple[Slot, ...]:
        """`weight` of a Linear or Conv2d that is larger than N members of rank 1."""
        return ("weight",) if self.sizes(site) else ()

    def sizes(self, site: Site) -> tuple[int, ...]:
        """Powers of two, the rank of each member, at which all members have fewer entries than the weight itself."""
        if not site.is_matrix or "weight" not in site.slots:
            return ()
        return powers_of_two((site.n_weight - 1) // (self.members * (site.in_features + site.out_features)))

    def cost(self, site: Site, size: int) -> Cost:
        """`N r (in_features + out_features)`; changes every entry of the weight."""
        r = check_size("pego", site, size, self.sizes(site))
        count = self.members * r * (site.in_features + site.out_features)
        return Cost.plain(count, entries=site.n_weight, tensors=2)

    def mergeable(self, site: Site) -> bool:
        """Yes: the change is one of the host's own tensors."""
        return True

    def build(self, site: Site, option: Option, host: nn.Module, generator: torch.Generator) -> PEGOAdapter:
        """Every A drawn from the Kaiming uniform distribution of a Linear layer, every B zero."""
        r = check_size("pego", site, option.size, self.sizes(site))
        return PEGOAdapter(site, host, self.members, r, self.strength, generator)

    def gains(self, site: Site, evidence: Evidence, sizes: Sequence[int]) -> tuple[float, ...]:
        """Sum of the N r largest squared singular values of the signal: the members together are of rank N r.

        The penalty is zero at the start and is not part of it.
        """
        energies = squared_singular_values(evidence["weight"].signal.flatten(1))
        return captured(energies, [self.members * size for size in sizes])


class PEGOAdapter(LowRankAdapter):
    """`A` (N r, in_features) and `B` (out_features, N r): member i has rows and columns `i r` to `(i + 1) r`.

    The penalty needs the weight: `frozen` is a view of the host's own memory wherever that lies on the parameters'
    device, and is not saved.
    """

    frozen: Tensor

    def __init__(
        self, site: Site, host: nn.Module, members: int, rank: int, strength: float, generator: torch.Generator
    ) -> None:
        super().__init__(site, host)
        start = torch.empty(members * rank, site.in_features)
        nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator)
        self.A = new_parameter(host, start)
        self.B = new_parameter(host, torch.zeros(site.out_features, members * rank))
        self.rank = rank
        self.strength = strength
        weight = rows_of(site, host_tensor(site, host, site.parameter)).detach().flatten(1)
        self.register_buffer("frozen", weight, persistent=False)

    def branch(self, x: Tensor) -> Tensor:
        """As the base class says, all members in both products."""
        return self.expand(self.contract(x, self.A), self.B)

    def delta(self) -> dict[str, Tensor]:
        """`B A` as a tensor of the site's shape."""
        return {"weight": (self.B @ self.A).view(self.site.shape)}

    def low_rank(self) -> tuple[Tensor, Tensor]:
        """`(A, B)`."""
        return self.A.detach().clone(), self.B.detach().clone()

    def penalty(self) -> Tensor | None:
        """`strength` times the two sums of `PEGO`; None when the strength is 0."""
        if not self.strength:
            return None
        frozen = self.frozen.to(self.A.dtype)
        members = len(self.A) // self.rank
        downs, ups = torch.chunk(self.A, members), torch.chunk(self.B, members, dim=1)
        total = self.A.new_zeros(())
        for i, (a, b) in enumerate(zip(downs, ups, strict=True)):
            total = total + L1OfProduct.apply(frozen @ a.T, b)
            for other_a, other_b in zip(downs[i + 1 :], ups[i + 1 :], strict=True):
                total = total + L1OfProduct.apply(b @ (a @ other_a.T), other_b)
        return self.strength * total
