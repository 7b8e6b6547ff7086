"""Gradients of single samples from a layer's input and the gradient of its output."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from autopeft.core.site import Site, Slot
from autopeft.scoring._streaming import channel_rows

__all__ = ["FORMULA_ERRORS", "sample_gradients"]

FORMULA_ERRORS = (AttributeError, IndexError, RuntimeError, TypeError, ValueError)
"""What a formula raises on a layer that it does not describe: shapes that do not fit, settings that are not there."""


def sample_gradients(site: Site, module: Any, slot: Slot, x: Tensor, dy: Tensor, samples: int) -> Tensor:
    """Gradient of one tensor of a layer for each sample by itself.

    With tokens t of sample i (positions, patches, windows): `sum_t dy_t x_t^T` for a Linear; the same on unfolded
    patches, group by group, for a convolution; `sum_t dy_t * x^_t` for the scale of a norm, with x^ its normalised
    input; `sum_t dy_t * x_t` for a layer scale; `sum_t dy_t` for a bias; `sum_t dy_t y_t^T` for the output matrix of
    a block, whose output is given as `x`.

    A formula may not describe a module that does more than its kind says (an activation inside, a standardised
    weight); the caller compares the sum over samples with autograd's gradient.

    Args:
        site: the whole site.
        module: its host.
        slot: `weight`, `bias` or, for a block, `output`.
        x: the layer's input, samples outermost.
        dy: gradient of the sum of the samples' losses with respect to the layer's output.
        samples: samples in `x` and `dy`.

    Returns:
        (samples, *shape of the tensor).

    Raises:
        FORMULA_ERRORS: when the formula does not fit the module.
    """
    axis = 1 if site.kind in ("conv2d", "batch_norm") else site.channel_axis
    if slot == "bias":
        return channel_rows(dy, axis, samples).sum(1)
    if site.kind == "conv2d":
        return _convolution(site, module, x, dy, samples)
    if site.kind in ("linear", "block"):
        return channel_rows(dy, axis, samples).mT @ channel_rows(x, axis, samples)
    if site.kind == "batch_norm":
        x = F.batch_norm(x, module.running_mean, module.running_var, None, None, False, 0.0, module.eps)
    elif site.kind == "layer_norm":
        x = _normalised(site, module, x)
    elif site.kind != "layer_scale":
        raise ValueError(f"no formula for a {site.kind}")
    return (channel_rows(dy, axis, samples) * channel_rows(x, axis, samples)).sum(1)


def _convolution(site: Site, module: Any, x: Tensor, dy: Tensor, samples: int) -> Tensor:
    if module.padding_mode != "zeros" or isinstance(module.padding, str):
        raise ValueError(f"no formula for padding {module.padding!r} with {module.padding_mode}")
    patches = F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)
    n, groups = len(x), site.groups
    patches = patches.reshape(n, groups, -1, patches.shape[-1])
    rows = dy.reshape(n, groups, site.shape[0] // groups, -1)
    return (rows @ patches.mT).reshape(samples, -1, *site.shape).sum(1)


def _normalised(site: Site, module: Any, x: Tensor) -> Tensor:
    """The input of a norm's scale."""
    if isinstance(module, nn.GroupNorm):
        return F.group_norm(x, module.num_groups, None, None, module.eps)
    last = x.movedim(site.channel_axis, -1)
    shape = (last.shape[-1],)
    if "rms" in type(module).__name__.lower():
        last = F.rms_norm(last, shape, None, module.eps)
    else:
        last = F.layer_norm(last, shape, None, None, module.eps)
    return last.movedim(-1, site.channel_axis)
