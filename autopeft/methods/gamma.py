"""A factor per output channel, without a shift."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from autopeft.core.budget import Cost
from autopeft.core.menu import Option
from autopeft.core.scores import Evidence
from autopeft.core.site import Site, Slot
from autopeft.methods._axis import along
from autopeft.methods._host import is_linear_in_weight, new_parameter
from autopeft.methods._single import SingleSize
from autopeft.methods._sizes import check_size
from autopeft.methods._spectrum import energy
from autopeft.methods.base import Adapter

__all__ = ["Gamma", "GammaAdapter"]


@dataclass(frozen=True, slots=True)
class Gamma(SingleSize):
    """`gamma * y` on the output of a projection or of a residual branch, per channel, from gamma 1.

    The factors that MemControl's DiffFit puts on queries, keys, values and outputs of an attention and behind each
    branch (Dutt et al., 2024, arXiv 2405.19458); on keys and values alone it is the attention part of IA3 (Liu et al.,
    2022, arXiv 2205.05638). What is trained is `gamma - 1`, so that weight decay pulls towards the identity. `ssf` adds
    a shift, `vector` trains the scale of a norm, `diffit` one factor per branch.
    """

    family: ClassVar[str] = "vector"

    def slots(self, site: Site) -> tuple[Slot, ...]:
        """`output` of a Linear, a convolution or a residual branch."""
        fits = site.is_matrix or site.kind == "residual"
        return ("output",) if fits and "output" in site.slots else ()

    def cost(self, site: Site, size: int) -> Cost:
        """One scalar per channel; merged, it changes every entry of weight and bias.

        Behind a branch the scalars themselves count as entries, since no tensor of the model can hold them.
        """
        check_size("gamma", site, size, self.sizes(site))
        n = site.out_features
        return Cost.plain(n, entries=site.n_weight + site.n_bias if site.is_matrix else n)

    def mergeable(self, site: Site) -> bool:
        """On a projection; a branch has no weight of its own."""
        return site.is_matrix

    def build(self, site: Site, option: Option, host: nn.Module, generator: torch.Generator) -> GammaAdapter:
        """The identity; nothing is random."""
        check_size("gamma", site, option.size, self.sizes(site))
        return GammaAdapter(site, host)

    def gains(self, site: Site, evidence: Evidence, sizes: Sequence[int]) -> tuple[float, ...]:
        """The energy of the gradient of gamma.

        On a projection `y = W x + b` it is `(G * W).sum(columns) + g_b * b`, behind a branch the diagonal of the
        branch's `sum over tokens of dL/dy y^T`, where the scorer kept that; else the gain is 0.
        """
        if site.kind == "residual":
            output = evidence.get("output")
            return (0.0 if output is None else energy(output.signal.diagonal()),) * len(sizes)
        weight = evidence["weight"]
        gamma = (weight.signal.double() * weight.value.double()).reshape(site.out_features, -1).sum(1)
        bias = evidence.get("bias")
        if bias is not None:
            gamma = gamma + bias.signal.double() * bias.value.double()
        return (energy(gamma),) * len(sizes)


class GammaAdapter(Adapter):
    """`scale` = gamma - 1 (out_features,)."""

    def __init__(self, site: Site, host: nn.Module) -> None:
        obstacle = ""
        if not site.is_matrix:
            obstacle = f"{site.name} is a residual branch and has no weight that a factor could go into"
        elif not is_linear_in_weight(host):
            obstacle = f"the output of a {type(host).__name__} does not scale with its weight"
        super().__init__(site, ("output",), "output", obstacle)
        self.scale = new_parameter(host, torch.zeros(site.out_features))

    def transform(self, y: Tensor) -> Tensor:
        """`y + scale * y` in the parameters' precision: bfloat16 could not tell 1 from 1.003."""
        wide = y.to(self.scale.dtype)
        return torch.addcmul(wide, wide, along(self.scale, y.ndim, self.site.channel_axis)).to(y.dtype)

    def merge(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`diag(gamma) W` and `gamma * b`."""
        gamma = 1 + self.scale
        return {slot: along(gamma.to(t.dtype), t.ndim, 0) * t for slot, t in tensors.items()}
