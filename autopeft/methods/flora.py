"""FLoRA: a change in Tucker form, one factor per mode of the weight."""

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
from autopeft.methods._host import new_parameter
from autopeft.methods._low_rank import LowRankAdapter
from autopeft.methods._sizes import check_size, half_octaves
from autopeft.methods._traits import ChoosesNothing
from autopeft.methods._tucker import nested_energies, tucker

__all__ = ["FLoRA", "FLoRAAdapter", "FactorStart"]

FactorStart = Literal["kaiming", "normal"]
"""Where the factors start; the core starts at zero."""


@dataclass(frozen=True, slots=True)
class FLoRA(ChoosesNothing):
    """`W + s G x_1 U_1 x_2 U_2 ...` with the core G and a factor per mode of W trained.

    Si et al., 2024, arXiv 2405.14739. The modes of a Linear are output and input, those of a
    convolution output, input / groups, and each of the kernel's. The released code takes the whole number of input
    channels for a grouped convolution, which does not fit its weight. G starts at zero, so the change is zero at step 0
    and no factor has a gradient before the first step. Size r is the rank of the output and of the input mode, each at
    most the mode's length. The input dropout of the released code is left out.

    Attributes:
        kernel_rank: largest rank of every kernel mode; the paper's example takes 2 for 7 x 7 kernels. None means the
            whole kernel.
        scale: s.
        start: `kaiming` draws factors from a normal distribution of standard deviation `sqrt(1 / (2 rank))`, as the
            released code for vision does; `normal` takes 0.02, as the one for language does.
    """

    kernel_rank: int | None = 2
    scale: float = 1.0
    start: FactorStart = "kaiming"

    family: ClassVar[str] = "matrix"

    def __post_init__(self) -> None:
        if self.kernel_rank is not None and self.kernel_rank < 1:
            raise UsageError(
                f"flora: kernel_rank must be at least 1, or null for the whole kernel, got {self.kernel_rank!r}"
            )
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise UsageError(f"flora: scale must be a positive number, got {self.scale!r}")
        if self.start not in get_args(FactorStart):
            raise UsageError(f"flora: start must be one of {', '.join(get_args(FactorStart))}, got {self.start!r}")

    def slots(self, site: Site) -> tuple[Slot, ...]:
        """`weight` of a Linear or convolution that is larger than its form of size 1."""
        return ("weight",) if self.sizes(site) else ()

    def ranks(self, site: Site, size: int) -> tuple[int, ...]:
        """The rank of every mode, in the order of the weight's."""
        kernel = self.kernel_rank
        wanted = [size, size, *(n if kernel is None else kernel for n in site.shape[2:])]
        return tuple(min(r, n) for r, n in zip(wanted, site.shape, strict=True))

    def sizes(self, site: Site) -> tuple[int, ...]:
        """1, 2, 3, 4, 6, 8, 12, ... as long as core and factors have fewer entries than the weight."""
        if not site.is_matrix or "weight" not in site.slots:
            return ()
        return tuple(r for r in half_octaves(max(site.shape[:2])) if self._count(site, r) < site.n_weight)

    def _count(self, site: Site, size: int) -> int:
        ranks = self.ranks(site, size)
        return math.prod(ranks) + sum(n * r for n, r in zip(site.shape, ranks, strict=True))

    def cost(self, site: Site, size: int) -> Cost:
        """Product of the ranks, plus length times rank of every mode; changes every entry of the weight."""
        r = check_size("flora", site, size, self.sizes(site))
        return Cost.plain(self._count(site, r), entries=site.n_weight, tensors=1 + len(site.shape))

    def mergeable(self, site: Site) -> bool:
        """Yes: the change is one of the host's own tensors."""
        return True

    def build(self, site: Site, option: Option, host: nn.Module, generator: torch.Generator) -> FLoRAAdapter:
        """Factors drawn as `start` says, the core zero."""
        r = check_size("flora", site, option.size, self.sizes(site))
        return FLoRAAdapter(site, host, self.ranks(site, r), self.scale, self.start, generator)

    def gains(self, site: Site, evidence: Evidence, sizes: Sequence[int]) -> tuple[float, ...]:
        """Energy of the signal in its truncated higher-order singular value decomposition of the same ranks.

        For a Linear that is the most that any step of these ranks can capture, the gain of LoRA.
        """
        return nested_energies(evidence["weight"].signal, [self.ranks(site, size) for size in sizes])


class FLoRAAdapter(LowRankAdapter):
    """`core` (r_1, r_2, ...) and `factors` (n_i, r_i), in the order of the weight's modes; and a fixed scale."""

    def __init__(
        self,
        site: Site,
        host: nn.Module,
        ranks: Sequence[int],
        scale: float,
        start: FactorStart,
        generator: torch.Generator,
    ) -> None:
        super().__init__(site, host)
        self.core = new_parameter(host, torch.zeros(*ranks))
        self.factors = nn.ParameterList()
        for n, r in zip(site.shape, ranks, strict=True):
            spread = 0.02 if start == "normal" else math.sqrt(1 / (2 * r))
            self.factors.append(new_parameter(host, spread * torch.randn(n, r, generator=generator)))
        self.scale = scale

    def _halves(self) -> tuple[Tensor, Tensor]:
        """Core and all factors but the first as a matrix (r_1, in_features), and the scaled first factor."""
        first, *rest = self.factors
        return tucker(self.core, rest, first=1).flatten(1), first if self.scale == 1.0 else self.scale * first

    def branch(self, x: Tensor) -> Tensor:
        """As the base class says, at the rank of the output mode in both products."""
        down, up = self._halves()
        return self.expand(self.contract(x, down), up)

    def delta(self) -> dict[str, Tensor]:
        """`scale * G x_1 U_1 x_2 U_2 ...`, of the site's shape."""
        down, up = self._halves()
        return {"weight": (up @ down).view(self.site.shape)}

    def low_rank(self) -> tuple[Tensor, Tensor]:
        """The core with all factors but the first, and the first."""
        down, up = self._halves()
        return down.detach(), up.detach().clone()
