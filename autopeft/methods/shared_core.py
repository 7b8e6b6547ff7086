"""Shared core: one small trained matrix for all layers of a kind, each between singular bases of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor, nn

from autopeft.core.budget import Cost
from autopeft.core.menu import Option
from autopeft.core.scores import Evidence
from autopeft.core.site import Site
from autopeft.methods._bases import LARGEST_RANK, top_singular
from autopeft.methods._grouped import Grouped, member_evidence, member_signal
from autopeft.methods._host import host_tensor, new_parameter
from autopeft.methods._low_rank import LowRankAdapter
from autopeft.methods._sizes import check_size
from autopeft.methods.base import Role, Shared

__all__ = ["SharedCore", "SharedCoreAdapter", "SharedCoreShared"]

_SIZES = (*range(1, 17), 18, 20, 24, 28, 32, 40, 48, 56, LARGEST_RANK)


@dataclass(frozen=True, slots=True)
class SharedCore(Grouped):
    """`W_l + U_l M V_l^T` for every layer l of one role, with one M (r, r) for all of them.

    A core matrix (see `core`) costs r^2 per layer; here it costs r^2 for all of a model's qkv projections together, or
    for all of its fc1. What the layers share is a change in their own coordinates: entry (i, j) of M sends what a
    layer reads with its j-th right singular vector to its i-th left one. U_l and V_l are frozen, computed again from
    W_l when a plan is loaded, and not stored. M starts at zero, an exact identity.

    Attributes:
        scales: whether every layer trains a factor of its own for M, from 1: `W_l + s_l U_l M V_l^T` at one scalar
            more per layer. A layer that M does not suit can then take less of it, or its opposite.
    """

    scales: bool = False

    family: ClassVar[str] = "core"

    def members(self, site: Site) -> tuple[Site, ...]:
        """The Linears or convolutions of a group `*:ROLE`."""
        if site.kind != "group" or not site.name.startswith("*:"):
            return ()
        return tuple(m for m in site.members if m.is_matrix and "weight" in m.slots)

    def sizes(self, site: Site) -> tuple[int, ...]:
        """1 to 16, then 18, 20, 24, 28, 32, 40, 48, 56, 64, as far as the smallest side of any member goes."""
        largest = min((min(m.in_features, m.out_features) for m in self.members(site)), default=0)
        return tuple(r for r in _SIZES if r <= largest)

    def cost(self, site: Site, size: int) -> Cost:
        """`r^2`, and one scalar per member with `scales`; changes every entry of the members."""
        r = check_size("shared_core", site, size, self.sizes(site))
        members = self.members(site)
        trained = r * r + (len(members) if self.scales else 0)
        return Cost.plain(trained, entries=sum(m.n_weight for m in members), tensors=1 + self.scales)

    def build(self, site: Site, option: Option, host: nn.Module, generator: torch.Generator) -> SharedCoreShared:
        """M zero, factors one; the bases come from the weights and nothing is random."""
        r = check_size("shared_core", site, option.size, self.sizes(site))
        return SharedCoreShared(site, self.members(site), host, r, self.scales)

    def gains(self, site: Site, evidence: Evidence, sizes: Sequence[int]) -> tuple[float, ...]:
        """`|sum_l U_l^T S_l V_l|^2 / L`: the energy of the signals' projection on the changes that M can make.

        The L changes of one entry of M are orthogonal to each other and of norm 1 each, hence the division. Factors of
        the layers have no gradient at the start, where M is zero, and add nothing.
        """
        members = self.members(site)
        rank = min(max(sizes), self.sizes(site)[-1])
        pull = torch.zeros(rank, rank, dtype=torch.float64)
        for member in members:
            u, v = top_singular(member_evidence(evidence, member)["weight"].value, None, rank)
            signal = member_signal(evidence, member)
            pull += (u.to(signal.dtype).T @ signal @ v.to(signal.dtype)).double()
        total = pull.square().cumsum(0).cumsum(1).diagonal() / len(members)
        return tuple(float(total[min(size, rank) - 1]) for size in sizes)


class SharedCoreShared(Shared):
    """The core `M` (r, r) of a group, and the factors `scales` (L,) of its layers where they are trained."""

    rate_roles: ClassVar[Mapping[str, Role]] = MappingProxyType({"scales": "vector"})

    scales: nn.Parameter | None

    def __init__(self, site: Site, members: tuple[Site, ...], model: nn.Module, rank: int, scaled: bool) -> None:
        super().__init__(site)
        self.M = new_parameter(model, torch.zeros(rank, rank))
        self.scales = new_parameter(model, torch.ones(len(members))) if scaled else None
        for number, member in enumerate(members):
            self.add(SharedCoreAdapter(member, model.get_submodule(member.module), self, number))

    def core(self, number: int) -> Tensor:
        """M as the layer of this number has it, with gradient."""
        return self.M if self.scales is None else self.scales[number] * self.M


class SharedCoreAdapter(LowRankAdapter):
    """One layer's bases `U` (out_features, r) and `V` (in_features, r), buffers that are not saved."""

    recomputed = frozenset({"U", "V"})

    U: Tensor
    V: Tensor

    def __init__(self, site: Site, host: nn.Module, shared: SharedCoreShared, number: int) -> None:
        super().__init__(site, host)
        self._shared, self._number = (shared,), number
        u, v = top_singular(host_tensor(site, host, site.parameter), site.rows, len(shared.M))
        self.register_buffer("U", u.to(shared.M, copy=True), persistent=False)
        self.register_buffer("V", v.to(shared.M, copy=True), persistent=False)

    def _core(self) -> Tensor:
        return self._shared[0].core(self._number)

    def branch(self, x: Tensor) -> Tensor:
        """As the base class says, at rank r in both products."""
        return self.expand(self.contract(x, self._core() @ self.V.T), self.U)

    def delta(self) -> dict[str, Tensor]:
        """`U M V^T` as a tensor of the site's shape."""
        return {"weight": (self.U @ self._core() @ self.V.T).view(self.site.shape)}

    def low_rank(self) -> tuple[Tensor, Tensor]:
        """`(V^T, U M)`."""
        return self.V.T.clone(), self.U @ self._core().detach()
