"""Convpass: a bottleneck with a convolution over the patches, beside residual branches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autopeft.core.budget import Cost
from autopeft.core.menu import Option
from autopeft.core.scores import Evidence
from autopeft.core.site import Site, Slot
from autopeft.methods._bottleneck import activate
from autopeft.methods._host import new_parameter
from autopeft.methods._parallel import branch_gains, branch_sizes, check_dropout, check_scale
from autopeft.methods._patches import check_prefix, on_patches
from autopeft.methods._sizes import check_size
from autopeft.methods._traits import ChoosesNothing
from autopeft.methods.base import Adapter

__all__ = ["Convpass", "ConvpassAdapter"]


@dataclass(frozen=True, slots=True)
class Convpass(ChoosesNothing):
    """`f(norm(x)) + s U act(conv(act(D norm(x))))` beside attention and MLP, act QuickGELU, conv 3x3 over the patches.

    Jie and Deng, 2022, arXiv 2207.07039. It cannot be merged. Sizes are bottleneck widths
    h. The convolution starts as the identity (ones in the centre of the kernel). Class and register tokens have no
    neighbours: each is convolved as a map of one patch, that is by the centre of the kernel.

    Patches are taken to lie in rows, behind the other tokens, on a square grid: N tokens are p + s^2 with the smallest
    p, which `prefix` corrects. Tokens that prompt tuning puts behind a block's own are known and kept apart. A branch
    that is given windows (Swin's attention) is convolved inside each window. Anything else is refused when it runs: the
    site does not tell how large images are.

    Attributes:
        scale: s; the paper picks 0.01, 0.1, 1 or 10 per data set.
        dropout: share of the hidden values that training drops.
        prefix: tokens in front of the patches; null infers their number.
    """

    scale: float = 1.0
    dropout: float = 0.1
    prefix: int | None = None

    family: ClassVar[str] = "adapter"

    def __post_init__(self) -> None:
        check_scale("convpass", self.scale)
        check_dropout("convpass", self.dropout)
        check_prefix("convpass", self.prefix)

    def slots(self, site: Site) -> tuple[Slot, ...]:
        """`output` of a residual branch."""
        return ("output",) if self.sizes(site) else ()

    def sizes(self, site: Site) -> tuple[int, ...]:
        """Powers of two up to half of the channels."""
        return branch_sizes(site, ("attn", "mlp"))

    def cost(self, site: Site, size: int) -> Cost:
        """`2 C h + C + 9 h^2 + 2 h`; added parameters count as entries, since no tensor of the model can hold them."""
        h, channels = check_size("convpass", site, size, self.sizes(site)), site.out_features
        n = 2 * channels * h + channels + 9 * h * h + 2 * h
        return Cost.plain(n, entries=n, tensors=6)

    def mergeable(self, site: Site) -> bool:
        """No: it is not linear in its input."""
        return False

    def build(self, site: Site, option: Option, host: nn.Module, generator: torch.Generator) -> ConvpassAdapter:
        """D drawn from the Xavier uniform distribution, the convolution an identity, U and the biases zero."""
        h = check_size("convpass", site, option.size, self.sizes(site))
        return ConvpassAdapter(self, site, host, h, generator)

    def gains(self, site: Site, evidence: Evidence, sizes: Sequence[int]) -> tuple[float, ...]:
        """A proxy: 1/4 of the h largest squared singular values of the block's `sum over tokens of dL/dy y^T`.

        What the convolution adds lies between neighbouring tokens, which evidence summed over tokens does not show.
        Without such evidence the gain is 0.
        """
        return branch_gains(evidence, sizes)


class ConvpassAdapter(Adapter):
    """The bypass.

    Parameters: `down_weight` D (h, C), `down_bias` (h,), `conv_weight` (h, h, 3, 3), `conv_bias` (h,), `up_weight` U
    (C, h), `up_bias` (C,).
    """

    def __init__(self, method: Convpass, site: Site, host: nn.Module, width: int, generator: torch.Generator) -> None:
        super().__init__(site, ("output",), "branch", "a convolution between activations is not linear in its input")
        channels = site.out_features
        down = nn.init.xavier_uniform_(torch.empty(width, channels), generator=generator)
        kernel = torch.zeros(width, width, 3, 3)
        kernel[:, :, 1, 1] = torch.eye(width)
        self.down_weight = new_parameter(host, down)
        self.down_bias = new_parameter(host, torch.zeros(width))
        self.conv_weight = new_parameter(host, kernel)
        self.conv_bias = new_parameter(host, torch.zeros(width))
        self.up_weight = new_parameter(host, torch.zeros(channels, width))
        self.up_bias = new_parameter(host, torch.zeros(channels))
        self.scale = method.scale
        self.dropout = method.dropout
        self.prefix = method.prefix

    def branch(self, x: Tensor) -> Tensor:
        """The convolutional bypass; tokens (B, N, C), or a square map with its channels where the site has them."""
        last = x.movedim(self.site.channel_axis, -1)
        hidden = activate("quick_gelu", F.linear(last, self.down_weight.to(x.dtype), self.down_bias.to(x.dtype)))
        hidden = activate("quick_gelu", on_patches(self.site, hidden, self.prefix, self._convolve, self._alone))
        hidden = F.dropout(hidden, self.dropout, self.training)
        change = F.linear(hidden, self.up_weight.to(hidden.dtype), self.up_bias.to(hidden.dtype))
        return (self.scale * change).movedim(-1, self.site.channel_axis)

    def _convolve(self, maps: Tensor) -> Tensor:
        weight, bias = self.conv_weight.to(maps.dtype), self.conv_bias.to(maps.dtype)
        return F.conv2d(maps.movedim(-1, 1), weight, bias, padding=1).movedim(1, -1)

    def _alone(self, tokens: Tensor) -> Tensor:
        """A 3x3 convolution of a zero-padded map of one patch: the centre of the kernel."""
        return F.linear(tokens, self.conv_weight[:, :, 1, 1].to(tokens.dtype), self.conv_bias.to(tokens.dtype))
