"""Sparse pool: a fixed number of trained entries that move between and within the weights of a group."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autopeft.core.budget import Cost
from autopeft.core.menu import Indices, Option
from autopeft.core.scores import Evidence
from autopeft.core.site import Site
from autopeft.errors import UsageError
from autopeft.methods._chosen import best_entries, smallest_entries
from autopeft.methods._competition import Competing
from autopeft.methods._dense_gradient import DenseGradient
from autopeft.methods._grouped import Grouped, member_evidence, member_signal
from autopeft.methods._host import is_plain, new_parameter
from autopeft.methods._sizes import check_size, powers_of_two
from autopeft.methods._sparse import SparseConv, SparseLinear
from autopeft.methods._spectrum import captured, energy
from autopeft.methods.base import Adapter

__all__ = ["SparsePool", "SparsePoolAdapter", "SparsePoolShared", "SparsePoolStart"]

SparsePoolStart = Literal["scored", "random"]
"""Where the entries lie at the start: where the score is largest, or anywhere."""


@dataclass(frozen=True, slots=True)
class SparsePool(Grouped):
    """`W_l + S_l`, all S_l together zero but for n trained values, whose positions change while they train.

    RigL (Evci et al., 2020, arXiv 1911.11134, algorithm 1) on the change of pre-trained weights, over all Linears and
    convolutions of a group at once: every `every` steps before the share `until` of the training, the
    `fraction / 2 (1 + cos(pi step / last)) n` values of smallest magnitude are given up, and as many entries of largest
    gradient that were not in the pool are taken in, at zero, wherever in the group they lie. A dense gradient exists
    only in the backward pass before such a step, for one weight at a time. Adam's moments start anew after it.

    n values are trained from the first step to the last, and as many positions are stored. Positions number the
    entries of all members in model order.

    Attributes:
        every: steps from one exchange to the next.
        until: share of the training after which nothing is exchanged.
        fraction: share of the values exchanged at first.
        start: `scored` takes the entries of largest score, `random` draws them.

    Raises:
        UsageError: naming the field and the value that is out of range.
    """

    every: int = 50
    until: float = 0.75
    fraction: float = 0.3
    start: SparsePoolStart = "scored"

    family: ClassVar[str] = "entries"

    def __post_init__(self) -> None:
        if self.every < 1:
            raise UsageError(f"sparse_pool: every is a number of steps of at least 1, got {self.every!r}")
        for name, value in (("until", self.until), ("fraction", self.fraction)):
            if not 0 <= value <= 1:
                raise UsageError(f"sparse_pool: {name} must lie between 0 and 1, got {value!r}")
        if self.start not in get_args(SparsePoolStart):
            raise UsageError(
                f"sparse_pool: start must be one of {', '.join(get_args(SparsePoolStart))}, got {self.start!r}"
            )

    def members(self, site: Site) -> tuple[Site, ...]:
        """The Linears and convolutions of the groups `*` and `*:ROLE`."""
        if site.kind != "group" or site.name.partition(":")[0] != "*":
            return ()
        found = tuple(m for m in site.members if m.is_matrix and "weight" in m.slots)
        return found if len(found) > 1 else ()

    def entries(self, site: Site) -> int:
        """Entries of all members."""
        return sum(m.n_weight for m in self.members(site))

    def sizes(self, site: Site) -> tuple[int, ...]:
        """Powers of two up to half of all entries."""
        return powers_of_two(self.entries(site) // 2)

    def cost(self, site: Site, size: int) -> Cost:
        """`n` values; beside each a position of 32 bits is stored, of 64 in groups of 2^31 entries and more."""
        n = check_size("sparse_pool", site, size, self.sizes(site))
        bits = 32 if self.entries(site) < 1 << 31 else 64
        return Cost(trainable=n, stored=2 * n, bits=(32 + bits) * n, entries=n, tensors=2)

    def select(self, site: Site, evidence: Evidence, size: int) -> Indices | None:
        """The `size` entries of all members with the largest score, the first among equals; None for `random`."""
        n = check_size("sparse_pool", site, size, self.sizes(site))
        return None if self.start == "random" else Indices(self._best(site, evidence, n)[0].numpy())

    def _best(self, site: Site, evidence: Evidence, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """Positions of the best entries, increasing, with their scores and signals."""
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        offset = 0
        for member in self.members(site):
            score = member_evidence(evidence, member)["weight"].score.detach().cpu().flatten().abs()
            own = best_entries(score, n)
            found.append((own + offset, score[own], member_signal(evidence, member).flatten()[own]))
            offset += member.n_weight
        position, scores, signals = (torch.cat(column) for column in zip(*found, strict=True))
        best = best_entries(scores, n)
        return position[best], scores[best], signals[best]

    def gains(self, site: Site, evidence: Evidence, sizes: Sequence[int]) -> tuple[float, ...]:
        """The signal's energy at the entries that are held at the start: of `random` ones the expectation `n / N`."""
        if self.start == "random":
            share = sum(energy(member_signal(evidence, m)) for m in self.members(site)) / self.entries(site)
            return tuple(share * n for n in sizes)
        _, scores, signals = self._best(site, evidence, max(sizes))
        order = torch.sort(scores, descending=True, stable=True).indices
        return captured(signals[order].double().square(), sizes)

    def build(self, site: Site, option: Option, host: nn.Module, generator: torch.Generator) -> SparsePoolShared:
        """Zero at the start; only `random` positions are random.

        Raises:
            UsageError: when the option does not say which entries although they are chosen by score, or names others
                than the group has.
        """
        n, total = check_size("sparse_pool", site, option.size, self.sizes(site)), self.entries(site)
        if option.indices is not None:
            position = torch.from_numpy(option.indices.values.copy())
        elif self.start == "random":
            position = torch.randperm(total, generator=generator)[:n].sort().values
        else:
            raise UsageError(
                f"option {option.key} does not say which {n:,} entries it starts with; choose them with `select` (from "
                f"the scores' evidence) before the plan is inserted, or set start to random"
            )
        if len(position) != n or int(position[-1]) >= total:
            raise UsageError(
                f"option {option.key} trains {n:,} of {total:,} entries, but its {len(position):,} positions go up to "
                f"{int(position[-1]):,}; they belong to another group"
            )
        return SparsePoolShared(site, self.members(site), host, position, self)


class SparsePoolShared(Competing):
    """`values` (n,), and `position` (n,), increasing, int32 or int64; in `watch` the best entries outside the pool."""

    unit = "entries"
    position: Tensor

    def __init__(
        self, site: Site, members: tuple[Site, ...], model: nn.Module, position: Tensor, method: SparsePool
    ) -> None:
        super().__init__(site)
        self.method = method
        self.start = self.end = len(position)
        self.offsets = (0, *accumulate(m.n_weight for m in members))
        self.values = new_parameter(model, torch.zeros(len(position)))
        device = self.values.device
        wide = self.offsets[-1] >= 1 << 31
        self.register_buffer("position", position.to(device, torch.int64 if wide else torch.int32))
        most = min(math.ceil(method.fraction * len(position)), self.offsets[-1] - len(position))
        outside = nn.Module()
        outside.register_buffer("gradient", self.values.detach().new_zeros(most))
        outside.register_buffer("position", torch.full((most,), -1, device=device))
        self.watch["outside"] = outside
        self.watching = False
        self._edges: tuple[Tensor, int, list[int]] | None = None
        for number, member in enumerate(members):
            self.add(SparsePoolAdapter(member, model.get_submodule(member.module), self, number))

    def edges(self) -> list[int]:
        """Where in the pool each member begins, and the last one ends."""
        # Reading them waits for the device; the version tells when positions have moved.
        known = self._edges
        if known is None or known[0] is not self.position or known[1] != self.position._version:
            offsets = torch.tensor(self.offsets, device=self.position.device, dtype=self.position.dtype)
            known = (self.position, self.position._version, torch.searchsorted(self.position, offsets).tolist())
            self._edges = known
        return known[2]

    def shares(self) -> dict[str, int]:
        """Values of each member now."""
        edges = self.edges()
        return {a.site.name: edges[i + 1] - edges[i] for i, a in enumerate(self.adapters())}

    def advance(self, step: int, total: int) -> bool:
        """Exchange entries when that is due, and look at dense gradients in the step before."""
        last = math.floor(self.method.until * total)
        moved = self._due(step, last) and self._exchange(self._count(step, last))
        self.watching = self._due(step + 1, last) and step + 1 < total
        if self.watching:
            self.watch["outside"].get_buffer("gradient").zero_()
        return moved

    def _due(self, step: int, last: int) -> bool:
        return 0 < step < last and step % self.method.every == 0

    def _count(self, step: int, last: int) -> int:
        return math.ceil(self.method.fraction / 2 * (1 + math.cos(math.pi * step / last)) * len(self.values))

    @torch.no_grad()
    def _exchange(self, count: int) -> bool:
        """Give up the smallest values for the best entries outside; whether anything changed."""
        gradient, position = (self.watch["outside"].get_buffer(name) for name in ("gradient", "position"))
        count = min(count, int((gradient > 0).sum()))
        if not count:
            return False
        kept = torch.ones(len(self.values), dtype=torch.bool)
        kept[smallest_entries(self.values, count)] = False
        kept = kept.to(self.values.device)
        new = torch.cat((self.position[kept].long(), position[:count]))
        order = new.argsort()
        self.position.copy_(new[order])
        self.values.copy_(F.pad(self.values[kept], (0, count))[order])
        return True

    @torch.no_grad()
    def note(self, number: int, dense: Tensor) -> None:
        """Take in the dense gradient of one member's weight: its best entries outside of the pool are remembered.

        Of several backward passes through a member in one step the last one counts.
        """
        edges, offset = self.edges(), self.offsets[number]
        mine = self.position[edges[number] : edges[number + 1]].long() - offset
        size = dense.detach().flatten().abs().nan_to_num_(0.0, 0.0, 0.0).index_fill_(0, mine, 0.0)
        gradient, position = (self.watch["outside"].get_buffer(name) for name in ("gradient", "position"))
        others = torch.where((position < offset) | (position >= offset + len(size)), gradient, 0.0)
        best, where = torch.topk(size, min(len(gradient), len(size)))
        both, places = torch.cat((others, best.to(gradient))), torch.cat((position, where + offset))
        # By gradient, and by position among equals, in whatever order the members come.
        order = places.argsort()
        order = order[both[order].sort(descending=True, stable=True).indices][: len(gradient)]
        gradient.copy_(both[order])
        position.copy_(places[order])


class SparsePoolAdapter(Adapter):
    """One weight's share of the pool."""

    def __init__(self, site: Site, host: nn.Module, shared: SparsePoolShared, number: int) -> None:
        conv = host if isinstance(host, nn.Conv2d) else None
        plain = is_plain(host) and not (conv is not None and isinstance(conv.padding, str))
        super().__init__(site, ("weight",), "branch" if plain else "swap")
        self._shared = (shared,)
        self.number = number
        self._geometry = None if conv is None else (conv.stride, conv.padding, conv.dilation, conv.groups)
        self._laid: tuple[list[int], tuple[Tensor, Tensor, Tensor, Tensor]] | None = None

    def _own(self) -> tuple[Tensor, Tensor]:
        """Values and their flat positions in this weight."""
        shared = self._shared[0]
        start, stop = shared.edges()[self.number : self.number + 2]
        return shared.values[start:stop], shared.position[start:stop].long() - shared.offsets[self.number]

    def branch(self, x: Tensor) -> Tensor:
        """What this weight's entries add; while gradients are watched, of the full shape of the host's output."""
        shared = self._shared[0]
        watching = shared.watching and torch.is_grad_enabled()
        values, index = self._own()
        if self._geometry is None:
            y = self._linear(x, values, index)
        elif len(values) or watching:
            y = SparseConv.apply(x, values, index, self.site.shape, *self._geometry)
        else:
            y = x.new_zeros(())
        if not watching:
            return y
        # Without a value of its own, a weight's gradient is wanted all the same.
        seen: Tensor = DenseGradient.apply(y, x, shared.values[:0].sum(), self._note, self.site.shape, self._geometry)
        return seen

    def _note(self, dense: Tensor) -> None:
        self._shared[0].note(self.number, dense)

    def _linear(self, x: Tensor, values: Tensor, index: Tensor) -> Tensor:
        full = x.new_zeros(*x.shape[:-1], self.site.out_features)
        if not len(values):
            return full
        rows, row_of, columns, col_of = self._layout(index)
        touched = SparseLinear.apply(x, values, row_of, col_of, len(rows), columns)
        return full.to(touched.dtype).index_copy(-1, rows, touched)

    def _layout(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Touched rows and columns, and which of them each entry lies in; made anew when the pool has moved."""
        edges = self._shared[0].edges()
        if self._laid is None or self._laid[0] is not edges or self._laid[1][0].device != index.device:
            rows, row_of = torch.unique(index // self.site.in_features, return_inverse=True)
            columns, col_of = torch.unique(index % self.site.in_features, return_inverse=True)
            self._laid = (edges, (rows, row_of, columns, col_of))
        return self._laid[1]

    def delta(self) -> dict[str, Tensor]:
        """The dense tensor that is zero but for the values."""
        values, index = self._own()
        flat = values.new_zeros(self.site.n_weight).index_put((index,), values)
        dense = flat.view(self.site.shape)
        if self._shared[0].watching and dense.requires_grad:
            dense.register_hook(self._note)  # type: ignore[no-untyped-call]  # torch gives no types
        return {"weight": dense}
