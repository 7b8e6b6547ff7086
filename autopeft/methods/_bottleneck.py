"""A residual bottleneck on an output."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autopeft.core.site import Site
from autopeft.methods._host import new_parameter
from autopeft.methods.base import Adapter

__all__ = ["BottleneckModule", "bottleneck_size"]


def bottleneck_size(channels: int, width: int) -> int:
    """Parameters of a bottleneck: `2 C r + r + C`."""
    return 2 * channels * width + width + channels


class BottleneckModule(Adapter):
    """`y + U gelu(D y + d) + u` over the channels of an output.

    Parameters: `down_weight` D (r, C), `down_bias` d (r,), `up_weight` U (C, r), `up_bias` u (C,). D is drawn from the
    Kaiming uniform distribution of a Linear layer, the others are zero.
    """

    def __init__(self, site: Site, host: nn.Module, width: int, generator: torch.Generator) -> None:
        super().__init__(site, ("output",), "output", "a bottleneck adapter is not linear in its input")
        channels = site.out_features
        start = torch.empty(width, channels)
        nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator)
        self.down_weight = new_parameter(host, start)
        self.down_bias = new_parameter(host, torch.zeros(width))
        self.up_weight = new_parameter(host, torch.zeros(channels, width))
        self.up_bias = new_parameter(host, torch.zeros(channels))

    def transform(self, y: Tensor) -> Tensor:
        """The output with the bottleneck's contribution added."""
        last = y.movedim(self.site.channel_axis, -1)
        hidden = F.gelu(F.linear(last, self.down_weight.to(y.dtype), self.down_bias.to(y.dtype)))
        change = F.linear(hidden, self.up_weight.to(hidden.dtype), self.up_bias.to(hidden.dtype))
        return y + change.movedim(-1, self.site.channel_axis).to(y.dtype)
