"""A residual bottleneck on an output."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autopeft.core.site import Site
from autopeft.methods._host import new_parameter
from autopeft.methods.base import Adapter

__all__ = ["Activation", "BottleneckModule", "activate", "bottleneck_size"]

Activation = Literal["relu", "gelu", "quick_gelu"]
"""What lies between the two matrices; `quick_gelu` is `x sigmoid(1.702 x)`."""


def bottleneck_size(channels: int, width: int) -> int:
    """Parameters of a bottleneck: `2 C r + r + C`."""
    return 2 * channels * width + width + channels


def activate(name: Activation, x: Tensor) -> Tensor:
    """The activation of a tensor, entry by entry."""
    if name == "relu":
        return F.relu(x)
    if name == "gelu":
        return F.gelu(x)
    return x * torch.sigmoid(1.702 * x)


class BottleneckModule(Adapter):
    """`y + U act(D y + d) + u` over the channels of an output.

    Parameters: `down_weight` D (r, C), `down_bias` d (r,), `up_weight` U (C, r), `up_bias` u (C,). D is drawn from the
    Kaiming uniform distribution of a Linear layer, the others are zero.

    Args:
        site: where.
        host: the module it goes on.
        width: r.
        generator: the randomness.
        activation: between the matrices.
        spread: when positive, D and U are drawn from a normal distribution of this deviation instead, cut off at two
            deviations, so that the start is near the identity.
    """

    def __init__(
        self,
        site: Site,
        host: nn.Module,
        width: int,
        generator: torch.Generator,
        activation: Activation = "gelu",
        spread: float = 0.0,
    ) -> None:
        super().__init__(site, ("output",), "output", "a bottleneck adapter is not linear in its input")
        channels = site.out_features
        down, up = torch.empty(width, channels), torch.zeros(channels, width)
        if spread:
            for start in (down, up):
                nn.init.trunc_normal_(start, std=spread, a=-2 * spread, b=2 * spread, generator=generator)
        else:
            nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
        self.activation: Activation = activation
        self.down_weight = new_parameter(host, down)
        self.down_bias = new_parameter(host, torch.zeros(width))
        self.up_weight = new_parameter(host, up)
        self.up_bias = new_parameter(host, torch.zeros(channels))

    def transform(self, y: Tensor) -> Tensor:
        """The output with the bottleneck's contribution added."""
        last = y.movedim(self.site.channel_axis, -1)
        hidden = activate(self.activation, F.linear(last, self.down_weight.to(y.dtype), self.down_bias.to(y.dtype)))
        change = F.linear(hidden, self.up_weight.to(hidden.dtype), self.up_bias.to(hidden.dtype))
        return y + change.movedim(-1, self.site.channel_axis).to(y.dtype)
