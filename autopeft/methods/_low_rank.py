"""Running `up @ down @ x` on Linear and Conv2d inputs without ever making the dense product."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from autopeft.core.site import Site
from autopeft.methods._host import is_plain
from autopeft.methods.base import Adapter

__all__ = ["LowRankAdapter"]


class LowRankAdapter(Adapter):
    """An adapter whose weight change factors into (out_features, r) times (r, in_features).

    It is a branch where that is the same thing and cheap. In a convolution in groups every group would have r hidden
    channels of its own, many times the work of a depthwise host: its weight is swapped for the changed one instead.
    """

    def __init__(self, site: Site, host: nn.Module, *, thin: bool = True) -> None:
        super().__init__(site, ("weight",), "branch" if thin and site.groups == 1 and is_plain(host) else "swap")
        self._stride: tuple[int, ...] = ()
        self._padding: tuple[int, ...] | str = ()
        self._dilation: tuple[int, ...] = ()
        if isinstance(host, nn.Conv2d):
            self._stride, self._padding, self._dilation = host.stride, host.padding, host.dilation

    def contract(self, x: Tensor, down: Tensor) -> Tensor:
        """`down @ x`.

        Args:
            x: (..., in_features), or (batch, channels, height, width) for a convolution.
            down: (r, in_features), the flattened kernel for a convolution.

        Returns:
            (..., r), or (batch, groups * r, height', width').
        """
        down = down.to(x.dtype)
        if self.site.kind == "linear":
            return F.linear(x, down)
        kernel = down.view(-1, *self.site.shape[1:])
        groups = self.site.groups
        if groups > 1:
            kernel = kernel.repeat(groups, 1, 1, 1)
        return F.conv2d(x, kernel, None, self._stride, self._padding, self._dilation, groups)

    def expand(self, z: Tensor, up: Tensor) -> Tensor:
        """`up @ z`, with z as `contract` gave it and `up` (out_features, r)."""
        up = up.to(z.dtype)
        if self.site.kind == "linear":
            return F.linear(z, up)
        return F.conv2d(z, up[:, :, None, None], groups=self.site.groups)
