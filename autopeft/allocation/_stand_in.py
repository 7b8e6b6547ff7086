"""Lone modules with the pre-trained values of a site, for building methods where there is no model."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from autopeft.core.site import Site

if TYPE_CHECKING:
    from autopeft.core.scores import Evidence

__all__ = ["stand_in"]


def stand_in(site: Site, evidence: Evidence) -> nn.Module | None:
    """A module in float64 that a method can be built on as on the site's host.

    Strides, paddings and what a subclass would do differently are not known and left out.

    Args:
        site: the site; for a group, a module with one host per member at its dotted path.
        evidence: where the values come from.

    Returns:
        The host; None for blocks and branches, which hold nothing, and where a value was not kept.
    """
    if site.kind == "group":
        model = nn.Module()
        for member in site.members:
            known = evidence.members.get(member.name)
            host = stand_in(member, known) if known is not None else None
            if host is None:
                return None
            _attach(model, member.module, host)
        return model
    if site.kind in ("block", "residual"):
        return None
    weight = evidence.get("tokens" if site.kind == "tokens" else "weight")
    if weight is None:
        return None
    host = _host(site)
    with torch.no_grad():
        _fill(site, host, site.parameter, weight.value)
        bias = evidence.get("bias")
        if site.has_bias and bias is not None:
            _fill(site, host, "bias", bias.value)
    return host


def _host(site: Site) -> nn.Module:
    rows = site.rows[1] if site.rows is not None else site.shape[0]
    if site.kind == "linear":
        host: nn.Module = nn.Linear(site.shape[1], rows, site.has_bias)
    elif site.kind == "conv2d":
        _, width, height, breadth = site.shape
        host = nn.Conv2d(width * site.groups, rows, (height, breadth), groups=site.groups, bias=site.has_bias)
    elif site.kind == "layer_norm":
        host = nn.LayerNorm(rows, bias=site.has_bias)
    elif site.kind == "batch_norm":
        host = nn.BatchNorm2d(rows)
    else:
        host = nn.Module()
        host.register_parameter(site.parameter, nn.Parameter(torch.zeros(site.shape)))
    return host.double().requires_grad_(False)


def _fill(site: Site, host: nn.Module, name: str, value: Tensor) -> None:
    parameter = host._parameters[name]
    assert parameter is not None
    rows = parameter if site.rows is None else parameter[site.rows[0] : site.rows[1]]
    if math.prod(rows.shape) == value.numel():
        rows.copy_(value.detach().cpu().double().view(rows.shape))


def _attach(model: nn.Module, path: str, host: nn.Module) -> None:
    *parents, last = path.split(".")
    for name in parents:
        child = model._modules.get(name)
        if child is None:
            child = nn.Module()
            model.add_module(name, child)
        model = child
    model.add_module(last, host)
