"""LoRA: a low-rank change of a Linear or Conv2d weight."""

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
from autopeft.core.site import Site
from autopeft.methods._host import new_parameter
from autopeft.methods._low_rank import LowRankAdapter
from autopeft.methods._scaling import Scaling, lora_scale
from autopeft.methods._sizes import check_size
from autopeft.methods._spectrum import captured, squared_singular_values
from autopeft.methods._traits import LowRankSized

__all__ = ["LoRA", "LoRAAdapter"]


@dataclass(frozen=True, slots=True)
class LoRA(LowRankSized):
    """`W + s B A` with A (r, in) and B (out, r) trained (Hu et al., 2021, arXiv 2106.09685, section 4.1).

    B starts at zero, so the change is zero at step 0 and A has no gradient before the first step. The weight of a
    convolution is flattened to (out, in / groups * kh * kw); with groups, every group shares the one A.

    Attributes:
        alpha: numerator of the scale s; None means a scale of 1 at every rank, `1 / sqrt(r)` with `sqrt`.
        scaling: `rank` for `s = alpha / r`; `sqrt` for `s = alpha / sqrt(r)` (rsLoRA), under which the best learning
            rate moves less from one rank to the next.

    Raises:
        UsageError: naming the field and the value that is out of range.
    """

    alpha: float | None = None
    scaling: Scaling = "rank"

    family: ClassVar[str] = "matrix"

    def __post_init__(self) -> None:
        lora_scale("lora", self.alpha, self.scaling, 1)

    def cost(self, site: Site, size: int) -> Cost:
        """`r (in_features + out_features)`; changes every entry of the weight."""
        r = check_size("lora", site, size, self.sizes(site))
        return Cost.plain(r * (site.in_features + site.out_features), entries=site.n_weight, tensors=2)

    def build(self, site: Site, option: Option, host: nn.Module, generator: torch.Generator) -> LoRAAdapter:
        """A drawn from the Kaiming uniform distribution of a Linear layer, B zero."""
        r = check_size("lora", site, option.size, self.sizes(site))
        adapter = LoRAAdapter(site, host, r, lora_scale("lora", self.alpha, self.scaling, r), generator)
        adapter.rank_in_scale = self.scaling == "sqrt"
        return adapter

    def gains(self, site: Site, evidence: Evidence, sizes: Sequence[int]) -> tuple[float, ...]:
        """Sum of the r largest squared singular values of the signal: the most that any rank-r step can capture."""
        return captured(squared_singular_values(evidence["weight"].signal.flatten(1)), sizes)

    def mergeable(self, site: Site) -> bool:
        """Yes: the change is one of the host's own tensors."""
        return True


class LoRAAdapter(LowRankAdapter):
    """Factors `A` (r, in_features) and `B` (out_features, r), and a fixed scale."""

    def __init__(self, site: Site, host: nn.Module, rank: int, scale: float, generator: torch.Generator) -> None:
        super().__init__(site, host)
        start = torch.empty(rank, site.in_features)
        nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator)
        self.A = new_parameter(host, start)
        self.B = new_parameter(host, torch.zeros(site.out_features, rank))
        self.scale = scale

    def branch(self, x: Tensor) -> Tensor:
        """As the base class says, at rank r in both products."""
        return self.expand(self.contract(x, self.A), self.B if self.scale == 1.0 else self.scale * self.B)

    def delta(self) -> dict[str, Tensor]:
        """`scale * B A` as a tensor of the site's shape."""
        return {"weight": (self.scale * (self.B @ self.A)).view(self.site.shape)}

    def low_rank(self) -> tuple[Tensor, Tensor]:
        """`(A, scale * B)`."""
        return self.A.detach().clone(), self.scale * self.B.detach()
