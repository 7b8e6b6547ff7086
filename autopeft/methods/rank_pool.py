"""Rank pool: low-rank changes of many weights that compete for ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from autopeft.core.budget import Cost
from autopeft.core.menu import Option
from autopeft.core.scores import Evidence
from autopeft.core.site import Site
from autopeft.errors import UsageError
from autopeft.methods._chosen import best_entries
from autopeft.methods._competition import Clock, Competing, Importance, check_clock, cubic
from autopeft.methods._grouped import Grouped, member_signal
from autopeft.methods._host import new_parameter
from autopeft.methods._low_rank import LowRankAdapter
from autopeft.methods._scaling import lora_scale
from autopeft.methods._sizes import check_size, powers_of_two
from autopeft.methods._spectrum import captured, squared_singular_values
from autopeft.methods.base import Role

__all__ = ["RankPool", "RankPoolAdapter", "RankPoolShared"]

_ROLES: tuple[tuple[str, Role], ...] = (("P", "up"), ("Q", "down"), ("L", "vector"))


@dataclass(frozen=True, slots=True)
class RankPool(Grouped):
    """`W_l + s P_l diag(L_l) Q_l` on every Linear and convolution of a group, which compete for ranks.

    AdaLoRA (Zhang et al., 2023, arXiv 2303.10512). Of size r every member starts with `ceil(start r)` triples (a column
    of P, a number of L, a row of Q); their total falls along a cubic curve to exactly r per member on average. Every
    `every` steps the triples of highest importance stay, wherever they lie: that of a triple is the sum of its L's and
    of the means over its column and its row (equation 7, see `Importance`). The numbers L of the others are set to zero
    and take no part, but keep their gradient, by which they can come back, until `cooldown` begins. L starts at zero,
    an exact identity; P and Q are normal with deviations of `1 / sqrt(out)` and `1 / sqrt(in)`, close to the
    orthonormal ones that the penalty `strength (|P^T P - I|^2 + |Q Q^T - I|^2)` asks for.

    It costs what the optimizer holds at the start, and the file holds the same: zeros for triples that have lost.
    Merged, or exported as LoRA, nothing is left of them.

    Attributes:
        start: triples at the start over those at the end, at least 1.
        alpha: numerator of the scale s = alpha / r; None means a scale of 1.
        strength: weight of the penalty; 0 for none.
        warmup: share of the steps before the first competition.
        cooldown: share of the steps after the last one.
        every: steps between two.
        beta_mean: b1 of `Importance`.
        beta_spread: b2.

    Raises:
        UsageError: naming the field and the value that is out of range.
    """

    start: float = 1.5
    alpha: float | None = None
    strength: float = 0.1
    warmup: float = 0.1
    cooldown: float = 0.3
    every: int = 10
    beta_mean: float = 0.85
    beta_spread: float = 0.85

    family: ClassVar[str] = "matrix"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.start) and self.start >= 1):
            raise UsageError(f"rank_pool: start must be a number of at least 1, got {self.start!r}")
        if not (math.isfinite(self.strength) and self.strength >= 0):
            raise UsageError(f"rank_pool: strength must be a number of at least 0, got {self.strength!r}")
        lora_scale("rank_pool", self.alpha, "rank", 1)
        check_clock("rank_pool", self.warmup, self.cooldown, self.every)
        for name, value in (("beta_mean", self.beta_mean), ("beta_spread", self.beta_spread)):
            if not 0 <= value < 1:
                raise UsageError(f"rank_pool: {name} must lie between 0 and below 1, got {value!r}")

    def members(self, site: Site) -> tuple[Site, ...]:
        """The Linears and convolutions of the groups `*` and `*:ROLE` that are larger than the factors of size 1."""
        if site.kind != "group" or site.name.partition(":")[0] != "*":
            return ()
        found = tuple(m for m in site.members if m.is_matrix and "weight" in m.slots and self._largest(m) >= 1)
        return found if len(found) > 1 else ()

    def _largest(self, member: Site) -> int:
        """The largest size whose factors at the start have fewer entries than the weight."""
        most = (member.n_weight - 1) // (member.in_features + member.out_features + 1)
        return next((size for size in reversed(powers_of_two(most)) if self.ranks(size) <= most), 0)

    def ranks(self, size: int) -> int:
        """Triples of each member at the start."""
        return math.ceil(self.start * size)

    def sizes(self, site: Site) -> tuple[int, ...]:
        """Powers of two at which every member's factors at the start have fewer entries than its weight."""
        return powers_of_two(min(map(self._largest, self.members(site)), default=0))

    def cost(self, site: Site, size: int) -> Cost:
        """`ceil(start r) (in + out + 1)` for every member; changes every entry of theirs."""
        r = check_size("rank_pool", site, size, self.sizes(site))
        members = self.members(site)
        count = self.ranks(r) * sum(m.in_features + m.out_features + 1 for m in members)
        return Cost.plain(count, entries=sum(m.n_weight for m in members), tensors=3 * len(members))

    def build(self, site: Site, option: Option, host: nn.Module, generator: torch.Generator) -> RankPoolShared:
        """P and Q drawn, L zero."""
        r = check_size("rank_pool", site, option.size, self.sizes(site))
        return RankPoolShared(site, self.members(site), host, r, self, generator)

    def gains(self, site: Site, evidence: Evidence, sizes: Sequence[int]) -> tuple[float, ...]:
        """The most that the ranks of the end can capture: the members' largest squared singular values, together.

        No member counts with more than it starts with.
        """
        members = self.members(site)
        energies = [squared_singular_values(member_signal(evidence, m)) for m in members]
        gains = []
        for size in sizes:
            pooled = torch.cat([e[: self.ranks(size)] for e in energies]).sort(descending=True).values
            gains.append(captured(pooled, [size * len(members)])[0])
        return tuple(gains)


class RankPoolShared(Competing):
    """One `RankPoolAdapter` per member, and in `watch` which triples take part and how important all are."""

    unit = "ranks"

    def __init__(
        self,
        site: Site,
        members: tuple[Site, ...],
        model: nn.Module,
        size: int,
        method: RankPool,
        generator: torch.Generator,
    ) -> None:
        super().__init__(site)
        self.method = method
        ranks = method.ranks(size)
        self.start, self.end = ranks * len(members), size * len(members)
        self.settled = False
        scale = lora_scale("rank_pool", method.alpha, "rank", size)
        for number, member in enumerate(members):
            host = model.get_submodule(member.module)
            adapter = RankPoolAdapter(member, host, ranks, scale, self, number, generator)
            self.add(adapter)
            self.watch[member.name.replace(".", ":")] = nn.ModuleList(
                Importance(p, method.beta_mean, method.beta_spread) for p in (adapter.L, adapter.P, adapter.Q)
            )
        live = nn.Module()
        live.register_buffer("mask", torch.ones(len(members), ranks, dtype=torch.bool, device=adapter.L.device))
        self.watch["live"] = live

    @property
    def rate_roles(self) -> Mapping[str, Role]:  # type: ignore[override]  # depends on the members
        """P spreads, Q sums, L is neither; on square weights the shapes alone would not tell."""
        return {f"members.{key}.{name}": role for key in self.members for name, role in _ROLES}

    @property
    def mask(self) -> Tensor:
        """(members, ranks): which triples take part."""
        return self.watch["live"].get_buffer("mask")

    def shares(self) -> dict[str, int]:
        """Triples of each member that take part now."""
        counts = self.mask.sum(1).tolist()
        return {a.site.name: count for a, count in zip(self.adapters(), counts, strict=True)}

    def scores(self) -> Tensor:
        """Importance of every triple, (members, ranks), float64."""
        rows = []
        for name in self.members:
            numbers, up, down = (e.score() for e in self.watch[name].children() if isinstance(e, Importance))
            rows.append(numbers + up.mean(0) + down.mean(1))
        return torch.stack(rows)

    def advance(self, step: int, total: int) -> bool:
        """Hold the competition when it is due."""
        clock = Clock(total, self.method.warmup, self.method.cooldown, self.method.every)
        if clock.due(step):
            self._choose(cubic(step, clock.first, clock.last, self.start, self.end))
        self.settled = step >= clock.last
        return False

    @torch.no_grad()
    def _choose(self, count: int) -> None:
        # Rank by rank and not member by member: equal scores are then spread over the members.
        order = self.scores().T.nan_to_num(0.0, 0.0, 0.0)
        chosen = torch.zeros(order.numel(), dtype=torch.bool)
        chosen[best_entries(order, count)] = True
        self.mask.copy_(chosen.view(order.shape).T)
        for row, adapter in zip(self.mask, self.adapters(), strict=True):
            if isinstance(adapter, RankPoolAdapter):
                adapter.L.mul_(row)

    def stored(self) -> dict[str, Tensor]:
        """The factors, with zeros in L for triples that take no part."""
        found = super().stored()
        for name, adapter in self.members.items():
            if isinstance(adapter, RankPoolAdapter):
                found[f"members.{name}.L"] = adapter.numbers().detach()
        return found

    def load_stored(self, tensors: Mapping[str, Tensor]) -> None:
        """As the base class says; all triples take part, those that did not with zeros."""
        super().load_stored(tensors)
        self.mask.fill_(True)

    def penalty(self) -> Tensor | None:
        """`strength` times the squared distances of all P and Q from orthonormal ones; None when the strength is 0."""
        if not self.method.strength:
            return None
        grams = [g for a in self.adapters() if isinstance(a, RankPoolAdapter) for g in (a.P.T @ a.P, a.Q @ a.Q.T)]
        distance = torch.stack(grams) - torch.eye(len(grams[0]), dtype=grams[0].dtype, device=grams[0].device)
        return self.method.strength * distance.square().sum()


class RankPoolAdapter(LowRankAdapter):
    """`P` (out_features, k), `L` (k,) and `Q` (k, in_features), k the triples at the start."""

    def __init__(
        self,
        site: Site,
        host: nn.Module,
        ranks: int,
        scale: float,
        shared: RankPoolShared,
        number: int,
        generator: torch.Generator,
    ) -> None:
        super().__init__(site, host)
        self._shared = (shared,)
        self.number, self.scale = number, scale
        n, out = site.in_features, site.out_features
        self.P = new_parameter(host, torch.randn(out, ranks, generator=generator) / math.sqrt(out))
        self.L = new_parameter(host, torch.zeros(ranks))
        self.Q = new_parameter(host, torch.randn(ranks, n, generator=generator) / math.sqrt(n))

    def numbers(self) -> Tensor:
        """L with zeros for triples that take no part; they keep their gradient until the shares are settled."""
        shared = self._shared[0]
        live = shared.mask[self.number]
        if shared.settled:
            return self.L * live
        return self.L - (self.L * ~live).detach()

    def branch(self, x: Tensor) -> Tensor:
        """As the base class says, at rank k in both products."""
        return self.expand(self.contract(x, self.Q), self.scale * self.P * self.numbers())

    def delta(self) -> dict[str, Tensor]:
        """`s P diag(L) Q` as a tensor of the site's shape."""
        return {"weight": (self.scale * (self.P * self.numbers()) @ self.Q).view(self.site.shape)}

    def low_rank(self) -> tuple[Tensor, Tensor]:
        """`(Q, s P diag(L))` of the triples that take part."""
        live = self._shared[0].mask[self.number]
        up = self.scale * self.P.detach() * self.numbers().detach()
        return self.Q.detach()[live].clone(), up[:, live]
