"""SNELLA: SNELL on many weights that compete for the entries of their changes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import nn

from autopeft.core.budget import Cost
from autopeft.core.menu import Option
from autopeft.core.scores import Evidence
from autopeft.core.site import Site
from autopeft.errors import UsageError
from autopeft.methods._competition import Clock, Competing, Importance, check_clock, cubic, proportional, share_out
from autopeft.methods._grouped import Grouped, member_evidence
from autopeft.methods._sizes import check_size
from autopeft.methods._sparsifiers import kept_entries
from autopeft.methods._spectrum import energy
from autopeft.methods.snell import SNELL, Implementation, SNELLAdapter, SNELLStart

__all__ = ["SNELLA", "SNELLAShared", "SNELLASparsifier"]

SNELLASparsifier = Literal["soft", "square", "hard"]
"""What becomes of the entries that are kept; see `snell`."""


@dataclass(frozen=True, slots=True)
class SNELLA(Grouped):
    """`W_l + S_l(K_l)` on every Linear and convolution of a group, with one budget of changed entries for all of them.

    SNELLA (arXiv 2510.24037), of which the abstract and the released code are the sources: SNELL's change of a weight
    (see `snell`) with the kernel `mixed`, and a competition in two stages. Between layers: every `every` steps the
    entries that may be changed, falling along a cubic curve from `start_sparsity` to `sparsity` of all the group's
    entries, are shared out in proportion to `mean(E_A) + mean(E_B)`, E a factor's sensitivity times its uncertainty
    (see `Importance`), no layer above its own size. Within a layer: the entries of largest |K|. All counts are whole
    and exact, at the end as well; who holds what is part of the saved state and of copies.

    The size is the rank r. A group takes fused projections whole. Steps are the clock, where the released code counts
    epochs. Since a layer without any entry has no gradient to win one back with, `floor` of the budget is shared out
    by size; 0 is the released rule. The shares no longer change once `cooldown` begins, so that the last weights are
    trained for the places they have.

    Attributes:
        sparsity: share of the group's entries that are zero at the end, from 0 to below 1.
        start_sparsity: the same at the start, in every layer alike; at most `sparsity`.
        sparsifier: `square` (the released one), `soft` or `hard`.
        coefficient: the number c in front of the kernel.
        warmup: share of the steps before the first competition.
        cooldown: share of the steps after the last one.
        every: steps between two.
        floor: share of the budget that no layer can lose.
        beta_mean: b1 of `Importance`.
        beta_spread: b2.
        start: as in `snell`.
        implementation: as in `snell`.

    Raises:
        UsageError: naming the field and the value that is out of range.
    """

    sparsity: float = 0.9
    start_sparsity: float = 0.0
    sparsifier: SNELLASparsifier = "square"
    coefficient: float = 0.1
    warmup: float = 0.0
    cooldown: float = 0.2
    every: int = 10
    floor: float = 0.01
    beta_mean: float = 0.85
    beta_spread: float = 0.85
    start: SNELLStart = "identity"
    implementation: Implementation = "auto"

    family: ClassVar[str] = "matrix"

    def __post_init__(self) -> None:
        if self.sparsifier not in get_args(SNELLASparsifier):
            raise UsageError(
                f"snella: sparsifier must be one of {', '.join(get_args(SNELLASparsifier))}, got {self.sparsifier!r}"
            )
        if not 0 <= self.sparsity < 1:
            raise UsageError(f"snella: sparsity is the share of zeros, from 0 to below 1, got {self.sparsity!r}")
        if not 0 <= self.start_sparsity <= self.sparsity:
            raise UsageError(
                f"snella: start_sparsity must lie between 0 and the sparsity {self.sparsity!r}, got "
                f"{self.start_sparsity!r}"
            )
        check_clock("snella", self.warmup, self.cooldown, self.every)
        for name, value in (("floor", self.floor), ("beta_mean", self.beta_mean), ("beta_spread", self.beta_spread)):
            if not 0 <= value < 1:
                raise UsageError(f"snella: {name} must lie between 0 and below 1, got {value!r}")
        self.each()

    def each(self) -> SNELL:
        """What each member starts as."""
        return SNELL(
            kernel="mixed",
            sparsifier=self.sparsifier,
            sparsity=self.start_sparsity,
            coefficient=self.coefficient,
            start=self.start,
            implementation=self.implementation,
        )

    def members(self, site: Site) -> tuple[Site, ...]:
        """The Linears and convolutions of the groups `*` and `*:ROLE` that are larger than their factors."""
        if site.kind != "group" or site.name.partition(":")[0] != "*":
            return ()
        each = self.each()
        found = tuple(m for m in site.members if each.slots(m))
        return found if len(found) > 1 and self.entries(found)[1] else ()

    def entries(self, members: Sequence[Site]) -> tuple[int, int]:
        """How many entries they change together at the start and at the end."""
        each = self.each()
        start = sum(each.kept(m) for m in members)
        return start, min(start, kept_entries(self.sparsity, sum(m.n_weight for m in members)))

    def sizes(self, site: Site) -> tuple[int, ...]:
        """Powers of two at which every member's factors have fewer entries than its weight."""
        each = self.each()
        return min((each.sizes(m) for m in self.members(site)), key=len, default=())

    def cost(self, site: Site, size: int) -> Cost:
        """`r (in + out) + 3` for every member; the entries are those of the end."""
        r = check_size("snella", site, size, self.sizes(site))
        members, each = self.members(site), self.each()
        total = sum((each.cost(m, r) for m in members), Cost.zero())
        return Cost(total.trainable, total.stored, total.bits, self.entries(members)[1], total.tensors)

    def build(self, site: Site, option: Option, host: nn.Module, generator: torch.Generator) -> SNELLAShared:
        """Every member as `snell` builds it."""
        r = check_size("snella", site, option.size, self.sizes(site))
        return SNELLAShared(site, self.members(site), host, r, self, generator)

    def gains(self, site: Site, evidence: Evidence, sizes: Sequence[int]) -> tuple[float, ...]:
        """The sum of the members' expectations as in `snell`, at most the expectation of the last budget's entries."""
        members, each = self.members(site), self.each()
        known = [member_evidence(evidence, m) for m in members]
        per_size = zip(*(each.gains(m, k, sizes) for m, k in zip(members, known, strict=True)), strict=True)
        most = sum(energy(k["weight"].signal) for k in known) * self.entries(members)[1]
        most /= sum(m.n_weight for m in members)
        return tuple(min(math.fsum(gains), most) for gains in per_size)


class SNELLAShared(Competing):
    """One `SNELLAdapter` per member, and in `watch` the importance of its factors."""

    unit = "entries"

    def __init__(
        self,
        site: Site,
        members: tuple[Site, ...],
        model: nn.Module,
        rank: int,
        method: SNELLA,
        generator: torch.Generator,
    ) -> None:
        super().__init__(site)
        self.method = method
        self.start, self.end = method.entries(members)
        each = method.each()
        for member in members:
            adapter = SNELLAdapter(member, model.get_submodule(member.module), rank, each, generator)
            self.add(adapter)
            self.watch[member.name.replace(".", ":")] = nn.ModuleList(
                Importance(factor, method.beta_mean, method.beta_spread) for factor in (adapter.A, adapter.B)
            )

    def shares(self) -> dict[str, int]:
        """Entries that each member changes now."""
        return {a.site.name: int(a.kept) for a in self._snells()}

    def scores(self) -> list[float]:
        """What each member competes with."""
        found = [torch.stack([e.score().mean() for e in pair]).sum() for pair in map(_importances, self.watch.values())]
        return torch.stack(found).tolist()

    def advance(self, step: int, total: int) -> bool:
        """Hold the competition when it is due; the optimizer's state stays, since every factor stays what it was."""
        clock = Clock(total, self.method.warmup, self.method.cooldown, self.method.every)
        if clock.due(step):
            self._share(cubic(step, clock.first, clock.last, self.start, self.end))
        return False

    def _share(self, volume: int) -> None:
        caps = [a.site.n_weight for a in self._snells()]
        given = share_out(self.scores(), caps, volume, proportional(self.method.floor, caps, volume))
        for adapter, kept in zip(self._snells(), given, strict=True):
            adapter.kept.fill_(kept)

    def _snells(self) -> list[SNELLAdapter]:
        return [a for a in self.adapters() if isinstance(a, SNELLAdapter)]


def _importances(pair: nn.Module) -> list[Importance]:
    return [e for e in pair.children() if isinstance(e, Importance)]
