"""What options build, looked at once for all sites that do not differ in what a method sees."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import nn

from autopeft.core.contracts import Method
from autopeft.core.menu import Indices, Option
from autopeft.core.site import Site
from autopeft.errors import UsageError
from autopeft.methods.base import Part

__all__ = ["alike", "built"]


def alike(model: nn.Module, method: Method, site: Site) -> tuple[Any, ...]:
    """Equal for sites on which a method builds the same, but for values and names; a group is like itself alone."""
    members = [(member.name, *_seen(model, member)) for member in site.members]
    return (repr(method), *(members or _seen(model, site)))


def _seen(model: nn.Module, site: Site) -> tuple[Any, ...]:
    host = model.get_submodule(site.module)
    return (
        type(host),
        "forward" in vars(host),
        site.kind,
        site.shape,
        site.has_bias,
        site.slots,
        site.rows is None,
        site.groups,
        site.channel_axis,
        getattr(host, "dilation", None),
        getattr(host, "stride", None),
        "." in site.module,
    )


def built(model: nn.Module, method: Method, site: Site, option: Option) -> Part:
    """What an option trains, with the first entries where it is of chosen ones."""
    host = model.get_submodule(site.module)
    try:
        part = method.build(site, option, host, torch.Generator().manual_seed(0))
    except UsageError:
        # Sparse options want to be told their entries.
        entries = dataclasses.replace(option, indices=Indices(np.arange(option.size, dtype=np.int64)))
        part = method.build(site, entries, host, torch.Generator().manual_seed(0))
    assert isinstance(part, Part)
    return part
