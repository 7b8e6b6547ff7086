"""SSF: a scale and a shift per output channel."""

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

__all__ = ["SSF", "SSFAdapter"]


@dataclass(frozen=True, slots=True)
class SSF(SingleSize):
    """`gamma * y + beta` on a host's output, per channel (Lian et al., 2022, arXiv 2210.08823, equation 1).

    It starts at gamma 1 and beta 0, an exact identity, where the paper draws both with standard deviation 0.02. What
    is trained is `gamma - 1`, so that weight decay pulls towards the identity.
    """

    family: ClassVar[str] = "vector"

    def slots(self, site: Site) -> tuple[Slot, ...]:
        """`output` of a Linear, convolution or norm."""
        fits = site.kind in ("linear", "conv2d", "layer_norm", "batch_norm")
        return ("output",) if fits and "output" in site.slots else ()

    def cost(self, site: Site, size: int) -> Cost:
        """Two scalars per channel; merged, it changes every entry of weight and bias."""
        check_size("ssf", site, size, self.sizes(site))
        return Cost.plain(2 * site.out_features, entries=site.n_weight + site.out_features, tensors=2)

    def mergeable(self, site: Site) -> bool:
        """Where the host has a bias that the shift can go into."""
        return site.has_bias

    def build(self, site: Site, option: Option, host: nn.Module, generator: torch.Generator) -> SSFAdapter:
        """The identity; nothing is random."""
        check_size("ssf", site, option.size, self.sizes(site))
        return SSFAdapter(site, host)

    def gains(self, site: Site, evidence: Evidence, sizes: Sequence[int]) -> tuple[float, ...]:
        """The energy of the gradients of gamma and beta, from those of weight and bias.

        With `y = W x + b`, the gradient of gamma is `(G * W).sum(columns) + g_b * b` and that of beta is `g_b`. Where
        there is no evidence on the bias (the host has none), the gradient of beta is not known and counts as zero.
        """
        weight = evidence["weight"]
        rows = site.out_features
        gamma = (weight.signal.double() * weight.value.double()).reshape(rows, -1).sum(1)
        bias = evidence.get("bias")
        beta = 0.0
        if bias is not None:
            gamma = gamma + bias.signal.double() * bias.value.double()
            beta = energy(bias.signal)
        return (energy(gamma) + beta,) * len(sizes)


class SSFAdapter(Adapter):
    """`scale` = gamma - 1 and `shift` = beta, each (out_features,)."""

    def __init__(self, site: Site, host: nn.Module) -> None:
        obstacle = ""
        if not site.has_bias:
            obstacle = "the host has no bias that the shift could go into"
        elif site.is_matrix and not is_linear_in_weight(host):
            obstacle = f"the output of a {type(host).__name__} does not scale with its weight"
        super().__init__(site, ("output",), "output", obstacle)
        self.scale = new_parameter(host, torch.zeros(site.out_features))
        self.shift = new_parameter(host, torch.zeros(site.out_features))

    def transform(self, y: Tensor) -> Tensor:
        """`y + scale * y + shift` in the parameters' precision: bfloat16 could not tell 1 from 1.003."""
        scale, shift = (along(v, y.ndim, self.site.channel_axis) for v in (self.scale, self.shift))
        return torch.addcmul(y + shift, y.to(scale.dtype), scale).to(y.dtype)

    def merge(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`diag(gamma) W` and `gamma * b + beta`."""
        weight, bias = tensors["weight"], tensors["bias"]
        gamma, beta = 1 + self.scale.to(weight.dtype), self.shift.to(bias.dtype)
        return {"weight": along(gamma, weight.ndim, 0) * weight, "bias": gamma.to(bias.dtype) * bias + beta}
