"""Earth-Adapter: bottlenecks on a block's map of patches and on its low and high frequencies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autopeft.core.budget import Cost
from autopeft.core.menu import Option
from autopeft.core.scores import Evidence
from autopeft.core.site import Site, Slot
from autopeft.errors import UsageError
from autopeft.methods._bottleneck import bottleneck_size
from autopeft.methods._frequency import low_pass
from autopeft.methods._host import new_parameter
from autopeft.methods._parallel import branch_gains, check_scale, kaiming
from autopeft.methods._patches import check_prefix, on_patches
from autopeft.methods._sizes import check_size, powers_of_two
from autopeft.methods._traits import ChoosesNothing
from autopeft.methods.base import Adapter

__all__ = ["EarthAdapter", "EarthAdapterModule"]


@dataclass(frozen=True, slots=True)
class EarthAdapter(ChoosesNothing):
    """`F + alpha (w_1 A_1(F) + w_2 A_2(low F) + w_3 A_3(high F))` on the patches F of a block's output.

    Hu et al., 2025, arXiv 2504.06220. `A_i(x) = U_i relu(D_i x + d_i) + u_i`; low F keeps the frequencies of
    the map of patches up to `rho min(H, W) / 2` on both axes, high F is the rest; the weights w are the softmax of a
    Linear router on each patch of F. Blocks outside of `fft_layers` have `F + alpha A_1(F)` alone. It cannot be merged.
    Sizes are bottleneck widths h.

    The released code keeps the frequencies from -k to k - 1, so that its low part is not quite real and loses its
    imaginary part; here both ends are kept, and low and high parts add up to F.

    Patches are taken to lie in rows, behind the other tokens, on a square grid: N tokens are p + s^2 with the smallest
    p, which `prefix` corrects. Outputs that are maps are their own grid, which must be square as well. Anything else is
    refused when it runs.

    Attributes:
        rho: share of the frequencies that are low, in (0, 1]; 0.3 or 0.2 in the paper.
        fft_layers: depths of the blocks that have the mixture; null means all.
        alpha: where the trained factor alpha starts.
        others: what happens to class and register tokens. `unchanged` leaves them alone, as the paper does for
            segmentation; behind the last block of a classifier that reads the class token alone, nothing would be
            trained then. `adapted` takes each for a map of one patch, whose only frequency is the lowest.
        start: `zero` sets every U to zero, so that training starts at the pre-trained model; `random` draws D and U
            alike, as the released code does, with alpha as the only damper.
        prefix: tokens in front of the patches; null infers their number.
    """

    rho: float = 0.3
    fft_layers: tuple[int, ...] | None = None
    alpha: float = 0.1
    others: Literal["adapted", "unchanged"] = "adapted"
    start: Literal["zero", "random"] = "zero"
    prefix: int | None = None

    family: ClassVar[str] = "adapter"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.rho) and 0 < self.rho <= 1):
            raise UsageError(f"earth_adapter: rho must lie in (0, 1], got {self.rho!r}")
        if self.fft_layers is not None and any(layer < 0 for layer in self.fft_layers):
            raise UsageError(
                f"earth_adapter: fft_layers are depths of blocks, counted from 0, got {self.fft_layers!r}; "
                f"null means all, an empty list none"
            )
        check_scale("earth_adapter", self.alpha)
        check_prefix("earth_adapter", self.prefix)

    def mixes(self, site: Site) -> bool:
        """Whether the block has the mixture."""
        return self.fft_layers is None or site.depth in self.fft_layers

    def slots(self, site: Site) -> tuple[Slot, ...]:
        """`output` of a block."""
        return ("output",) if self.sizes(site) else ()

    def sizes(self, site: Site) -> tuple[int, ...]:
        """Powers of two up to half of the channels."""
        if site.kind != "block" or "output" not in site.slots:
            return ()
        return powers_of_two(site.out_features // 2)

    def cost(self, site: Site, size: int) -> Cost:
        """`2 C h + h + C + 1` for one bottleneck and alpha; three of them and `3 C + 3` for the mixture.

        Added parameters count as entries, since no tensor of the model can hold them.
        """
        h, channels = check_size("earth_adapter", site, size, self.sizes(site)), site.out_features
        if not self.mixes(site):
            n = bottleneck_size(channels, h) + 1
            return Cost.plain(n, entries=n, tensors=5)
        n = 3 * bottleneck_size(channels, h) + 3 * channels + 3 + 1
        return Cost.plain(n, entries=n, tensors=7)

    def mergeable(self, site: Site) -> bool:
        """No: it is not linear in its input."""
        return False

    def build(self, site: Site, option: Option, host: nn.Module, generator: torch.Generator) -> EarthAdapterModule:
        """D and the router drawn from the Kaiming uniform distribution of a Linear layer, biases zero."""
        h = check_size("earth_adapter", site, option.size, self.sizes(site))
        return EarthAdapterModule(self, site, host, h, generator)

    def gains(self, site: Site, evidence: Evidence, sizes: Sequence[int]) -> tuple[float, ...]:
        """A proxy: 1/4 of the largest squared singular values of `sum over tokens of dL/dy y^T`, 3 h of them or h.

        The mixture is taken for three bottlenecks of their own. What its parts see of different frequencies does not
        show in evidence summed over tokens, and alpha only changes the size of a step. Without such evidence the gain
        is 0.
        """
        experts = 3 if self.mixes(site) else 1
        return branch_gains(evidence, [experts * size for size in sizes])


class EarthAdapterModule(Adapter):
    """E bottlenecks, 3 (spatial, low, high) or 1.

    Parameters: `down_weight` (E, h, C), `down_bias` (E, h), `up_weight` (E, C, h), `up_bias` (E, C), `alpha` (); for
    the mixture `router_weight` (3, C) and `router_bias` (3,).
    """

    def __init__(
        self, method: EarthAdapter, site: Site, host: nn.Module, width: int, generator: torch.Generator
    ) -> None:
        super().__init__(site, ("output",), "output", "a mixture of bottlenecks is not linear in its input")
        channels = site.out_features
        experts = 3 if method.mixes(site) else 1
        down = torch.stack([kaiming(width, channels, generator) for _ in range(experts)])
        up = torch.zeros(experts, channels, width)
        if method.start == "random":
            up = torch.stack([kaiming(channels, width, generator) for _ in range(experts)])
        self.down_weight = new_parameter(host, down)
        self.down_bias = new_parameter(host, torch.zeros(experts, width))
        self.up_weight = new_parameter(host, up)
        self.up_bias = new_parameter(host, torch.zeros(experts, channels))
        self.alpha = new_parameter(host, torch.tensor(method.alpha))
        self.router_weight = self.router_bias = None
        if experts > 1:
            self.router_weight = new_parameter(host, kaiming(experts, channels, generator))
            self.router_bias = new_parameter(host, torch.zeros(experts))
        self.rho = method.rho
        self.prefix = method.prefix
        self.adapts_others = method.others == "adapted"

    def transform(self, y: Tensor) -> Tensor:
        """The output with the adapters' contribution on its patches."""
        last = y.movedim(self.site.channel_axis, -1)
        change = on_patches(self.site, last, self.prefix, self._mixture, self._alone if self.adapts_others else None)
        return y + (self.alpha * change).to(y.dtype).movedim(-1, self.site.channel_axis)

    def _alone(self, tokens: Tensor) -> Tensor:
        """The change of tokens (B, M, C) that are no patches."""
        return self._mixture(tokens.reshape(-1, 1, 1, tokens.shape[-1])).view(tokens.shape)

    def _mixture(self, maps: Tensor) -> Tensor:
        """The change of a map (B, H, W, C), without alpha."""
        if self.router_weight is None or self.router_bias is None:
            return self._bottleneck(0, maps)
        low = low_pass(maps, int(min(maps.shape[1:3]) * self.rho / 2))
        routed = F.linear(maps, self.router_weight.to(maps.dtype), self.router_bias.to(maps.dtype))
        shares = routed.softmax(-1).unbind(-1)
        parts = (maps, low, maps - low)
        return torch.stack(
            [share[..., None] * self._bottleneck(i, x) for i, (share, x) in enumerate(zip(shares, parts, strict=True))]
        ).sum(0)

    def _bottleneck(self, i: int, x: Tensor) -> Tensor:
        hidden = F.relu(F.linear(x, self.down_weight[i].to(x.dtype), self.down_bias[i].to(x.dtype)))
        return F.linear(hidden, self.up_weight[i].to(x.dtype), self.up_bias[i].to(x.dtype))
