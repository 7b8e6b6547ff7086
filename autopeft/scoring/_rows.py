"""What a matrix multiplies: the rows that its layer's input is read in."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from autopeft.core.site import Site

__all__ = ["input_rows"]


def input_rows(site: Site, module: nn.Module, x: Tensor) -> Tensor:
    """The input of a Linear or convolution as (n, in_features), whatever is read at once in a row.

    A convolution reads patches, in groups one per group. They have zeros around them, or no surroundings where the
    padding is a word or done by the layer's own rule.

    Args:
        site: the layer's site.
        module: the layer.
        x: its input, the samples along axis 0.
    """
    if isinstance(module, nn.Conv2d):
        padding = 0 if isinstance(module.padding, str) else module.padding
        patches = F.unfold(x, module.kernel_size, module.dilation, padding, module.stride)
        x = patches.reshape(len(x), site.groups, site.in_features, -1).movedim(2, -1)
    return x.reshape(-1, site.in_features)
