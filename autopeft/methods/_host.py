"""What a method needs to know about the module it goes on."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from autopeft.core.site import Site
from autopeft.errors import UsageError

__all__ = ["host_tensor", "is_linear_in_weight", "is_plain", "new_parameter", "rows_of"]

_LINEAR_IN_WEIGHT = frozenset({"timm.layers.conv2d_same.Conv2dSame"})
"""Convolutions whose own forward is still linear in weight and bias: the padding differs, nothing else."""


def is_plain(host: nn.Module) -> bool:
    """Whether the host computes exactly `F.linear` or a zero-padded `F.conv2d` of its weight and bias.

    Only then is adding `branch(x)` to the output the same as changing the weight: a weight-standardised convolution
    normalises the changed weight, and `Conv2dSame` pads by a rule of its own.
    """
    if "forward" in vars(host):
        return False
    kind = type(host)
    if isinstance(host, nn.Linear):
        return kind.forward is nn.Linear.forward
    if isinstance(host, nn.Conv2d):
        plain = kind.forward is nn.Conv2d.forward and getattr(kind, "_conv_forward", None) is nn.Conv2d._conv_forward
        return plain and host.padding_mode == "zeros"
    return False


def is_linear_in_weight(host: nn.Module) -> bool:
    """Whether scaling the rows of weight and bias scales the host's output channels."""
    kind = type(host)
    return (
        is_plain(host)
        or (isinstance(host, nn.Conv2d) and kind.forward is nn.Conv2d.forward)
        or f"{kind.__module__}.{kind.__qualname__}" in _LINEAR_IN_WEIGHT
    )


def rows_of(site: Site, tensor: Tensor) -> Tensor:
    """The site's rows of a host's tensor: a view for a slice, the tensor itself otherwise."""
    if site.rows is None:
        return tensor
    start, stop = site.rows
    return tensor[start:stop]


def host_tensor(site: Site, host: nn.Module, name: str) -> nn.Parameter:
    """The parameter of the host by that name.

    Raises:
        UsageError: when the host has no such parameter of its own, or another shape than the catalogue says.
    """
    tensor = host._parameters.get(name)
    if tensor is None:
        raise UsageError(
            f"the host of {site.name} ({type(host).__name__}) holds no parameter {name!r}; "
            f"its own parameters are: {', '.join(host._parameters) or 'none'}. Scan the model again"
        )
    if name == site.parameter and tuple(rows_of(site, tensor).shape) != site.shape:
        raise UsageError(
            f"{name!r} of {site.name} has shape {tuple(tensor.shape)}, the catalogue says {site.shape} "
            f"(rows {site.rows}); the catalogue belongs to another model"
        )
    return tensor


def new_parameter(host: nn.Module, start: Tensor) -> nn.Parameter:
    """A trainable parameter that starts at `start`, on the host's device, float32 (float64 on a float64 host)."""
    tensors = [*host.parameters(), *host.buffers()]
    wide = any(t.dtype == torch.float64 for t in tensors)
    device = tensors[0].device if tensors else torch.device("cpu")
    return nn.Parameter(start.to(device=device, dtype=torch.float64 if wide else torch.float32))
