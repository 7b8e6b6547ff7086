"""Intrinsic dimension: few numbers, projected at random onto all weights."""

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
from autopeft.core.site import Site
from autopeft.errors import UsageError
from autopeft.methods._fastfood import Fastfood, Projection
from autopeft.methods._grouped import Grouped, member_signal
from autopeft.methods._host import host_tensor, new_parameter
from autopeft.methods._projections import DenseProjection, SparseProjection
from autopeft.methods._sizes import check_size, half_octaves
from autopeft.methods._spectrum import energy
from autopeft.methods.base import Adapter, Shared

__all__ = ["IntrinsicDim", "IntrinsicDimAdapter", "IntrinsicDimShared"]

_Projection = Literal["fastfood", "dense", "sparse"]
_Scope = Literal["all", "role"]

_KINDS: dict[str, type[Projection]] = {
    "fastfood": Fastfood,
    "dense": DenseProjection,
    "sparse": SparseProjection,
}

_LARGEST = 1 << 20
"""Largest z on offer."""

_HELD = 1 << 27
"""Most entries of a projection that is held as it is: half a gigabyte, twice that for `sparse`."""


@dataclass(frozen=True, slots=True)
class IntrinsicDim(Grouped):
    """`theta_0 + P z`: all weights of a group move along `size` random directions (Li et al., 2018, arXiv 1804.08838).

    z is trained from zero, an exact identity. P is fixed, has columns of unit norm, and runs
    over all weights of the group in model order, so that one z moves them together; biases and norms are not in it.
    How P is made:

    - `fastfood`: products of Walsh-Hadamard, permutation and diagonal matrices; D log2(size) additions per step for D
      weights and nine bytes of memory per weight. The one for models of any size.
    - `dense`: Gaussian, D * size numbers in memory; the largest size shrinks accordingly.
    - `sparse`: about sqrt(D) entries per column.

    Stored are z and the seed of P, drawn once when the option is built and followed when a plan is loaded; P itself is
    drawn again. The smallest size that reaches 90 % of full training's score is the task's intrinsic dimension; here
    size is one more thing that a budget decides.

    Attributes:
        projection: `fastfood`, `dense` or `sparse`.
        scope: `all` for one z over every weight of the model (group `*`), `role` for one per role (`*:ROLE`).

    Raises:
        UsageError: for an unknown projection or scope.
    """

    projection: _Projection = "fastfood"
    scope: _Scope = "all"
    family: ClassVar[str] = "core"

    def __post_init__(self) -> None:
        if self.projection not in get_args(_Projection):
            raise UsageError(
                f"projection of intrinsic_dim must be one of {', '.join(get_args(_Projection))}; "
                f"got {self.projection!r}"
            )
        if self.scope not in get_args(_Scope):
            raise UsageError(f"scope of intrinsic_dim must be {' or '.join(get_args(_Scope))}, got {self.scope!r}")

    def members(self, site: Site) -> tuple[Site, ...]:
        """Every Linear and convolution of group `*`, or of a group `*:ROLE`."""
        wanted = site.name == "*" if self.scope == "all" else site.name.startswith("*:")
        if site.kind != "group" or not wanted:
            return ()
        return tuple(m for m in site.members if m.is_matrix and "weight" in m.slots)

    def sizes(self, site: Site) -> tuple[int, ...]:
        """1, 2, 3, 4, 6, 8, 12, ... up to a quarter of the weights, at most 2^20 and what memory allows."""
        total = sum(m.n_weight for m in self.members(site))
        if not total:
            return ()
        held = {"fastfood": 0, "dense": total, "sparse": max(1, round(math.sqrt(total)))}[self.projection]
        return half_octaves(min(total // 4, _LARGEST, _HELD // held if held else _LARGEST))

    def cost(self, site: Site, size: int) -> Cost:
        """`size`, and the seed of 64 bits beside it; changes every entry of the members."""
        p = check_size("intrinsic_dim", site, size, self.sizes(site))
        return Cost(p, p + 1, 32 * p + 64, sum(m.n_weight for m in self.members(site)), 2)

    def build(self, site: Site, option: Option, host: nn.Module, generator: torch.Generator) -> IntrinsicDimShared:
        """Zero for z; the seed of P is drawn."""
        p = check_size("intrinsic_dim", site, option.size, self.sizes(site))
        seed = int(torch.randint(0, 2**62, (), generator=generator))
        return IntrinsicDimShared(site, self.members(site), host, _KINDS[self.projection], p, seed)

    def gains(self, site: Site, evidence: Evidence, sizes: Sequence[int]) -> tuple[float, ...]:
        """`size / D` of the signals' energy: what that many directions drawn blindly capture in expectation."""
        members = self.members(site)
        share = sum(energy(member_signal(evidence, m)) for m in members) / sum(m.n_weight for m in members)
        return tuple(share * size for size in sizes)


class IntrinsicDimShared(Shared):
    """`z` (size,), and the `seed` of the projection, int64 of shape (1,)."""

    moving = frozenset({"seed"})
    seed: Tensor

    def __init__(
        self, site: Site, members: tuple[Site, ...], model: nn.Module, kind: type[Projection], size: int, seed: int
    ) -> None:
        super().__init__(site)
        self.z = new_parameter(model, torch.zeros(size))
        self.register_buffer("seed", torch.tensor([seed], device=self.z.device))
        self.projection = kind(sum(m.n_weight for m in members), size)
        self._drawn: int | None = None
        self._looked: tuple[Tensor, int] | None = None
        start = 0
        for member in members:
            self.add(IntrinsicDimAdapter(member, model.get_submodule(member.module), self, start))
            start += member.n_weight

    def rows(self, start: int, stop: int) -> Tensor:
        """`P[start:stop] @ z`, P being that of the seed as it is now: loading replaces it."""
        # Reading the seed would wait for the device in every forward pass; its version tells when it has changed.
        if self._looked is None or self._looked[0] is not self.seed or self._looked[1] != self.seed._version:
            self._looked = (self.seed, self.seed._version)
            seed = int(self.seed)
            if seed != self._drawn:
                # Tensors made in inference mode could not be used in training afterwards.
                with torch.inference_mode(False), torch.no_grad():
                    self.projection.draw(seed, self.z.device)
                self._drawn = seed
        return self.projection.rows(self.z, start, stop)


class IntrinsicDimAdapter(Adapter):
    """One weight's share of the projection: its rows from `start` on."""

    def __init__(self, site: Site, host: nn.Module, shared: IntrinsicDimShared, start: int) -> None:
        host_tensor(site, host, site.parameter)
        super().__init__(site, ("weight",), "swap")
        self._shared = (shared,)
        self._start = start

    def delta(self) -> dict[str, Tensor]:
        """`P z` on the weight's rows, as a tensor of its shape."""
        rows = self._shared[0].rows(self._start, self._start + self.site.n_weight)
        return {"weight": rows.view(self.site.shape)}
