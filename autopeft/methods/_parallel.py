"""What adapters beside and behind residual branches have in common."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autopeft.core.scores import Evidence
from autopeft.core.site import Site
from autopeft.errors import UsageError
from autopeft.methods._bottleneck import Activation, activate
from autopeft.methods._host import new_parameter
from autopeft.methods._sizes import powers_of_two
from autopeft.methods._spectrum import captured, squared_singular_values
from autopeft.methods.base import Adapter

__all__ = [
    "LayerNormAt",
    "ParallelBottleneck",
    "Reads",
    "branch_gains",
    "branch_sizes",
    "check_dropout",
    "check_scale",
    "kaiming",
]

Reads = Literal["stream", "norm"]
"""What an adapter beside a branch is given: the residual `stream` as it is, or what the branch is given, behind its
`norm`. Where no norm lies in front of a branch, they are the same."""

LayerNormAt = Literal["in", "none"]
"""Whether an adapter normalises its own input."""

_SLOPE_SQUARED = 0.25
"""Squared derivative of GELU at 0, and of ReLU in the mean."""


def branch_sizes(site: Site, roles: Sequence[str]) -> tuple[int, ...]:
    """Bottleneck widths on a residual branch of one of the roles: powers of two up to half of the channels."""
    if site.kind != "residual" or "output" not in site.slots or site.role not in roles:
        return ()
    return powers_of_two(site.out_features // 2)


def branch_gains(evidence: Evidence, ranks: Sequence[int]) -> tuple[float, ...]:
    """Predicted gains of nonlinear maps of some ranks beside or behind a block's output.

    The most that a linear map of that rank on the output could capture of `sum over tokens of dL/dy y^T`, times the
    squared slope of the activation: a proxy, since what the adapter is given is not y. Scales and further activations
    are left out: they change the size of a step, which the learning rate does as well. Scorers that look at parameters
    alone keep no such evidence; the gain is then 0 for every size.
    """
    output = evidence.get("output")
    if output is None:
        return (0.0,) * len(ranks)
    return tuple(_SLOPE_SQUARED * top for top in captured(squared_singular_values(output.signal), ranks))


def check_dropout(method: str, dropout: float) -> None:
    """Refuse a share of dropped values that is none.

    Raises:
        UsageError: for a value outside of [0, 1).
    """
    if not 0 <= dropout < 1:
        raise UsageError(f"{method}: dropout must lie in [0, 1), got {dropout!r}")


def check_scale(method: str, scale: float) -> None:
    """Refuse a scale that would switch the adapter off or turn it around.

    Raises:
        UsageError: for a value that is not a positive number.
    """
    if not (math.isfinite(scale) and scale > 0):
        raise UsageError(f"{method}: scale must be a positive number, got {scale!r}")


def kaiming(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """A matrix (rows, columns) from the Kaiming uniform distribution of a Linear layer."""
    return nn.init.kaiming_uniform_(torch.empty(rows, columns), a=math.sqrt(5), generator=generator)


class ParallelBottleneck(Adapter):
    """`s (U act(D norm(x) + d) + u)` over the channels, added to the output of a residual branch.

    Parameters: `down_bias` d (h,) and `up_bias` u (C,), zero; `norm_weight` and `norm_bias` (C,), one and zero, when
    it normalises its input; `scale` s, a scalar that starts at 1, when that is learned. Subclasses add the matrices
    and give them in `matrices`.
    """

    def __init__(
        self,
        site: Site,
        host: nn.Module,
        width: int,
        *,
        reads: Reads,
        layer_norm: LayerNormAt,
        activation: Activation,
        dropout: float,
        scale: float | None,
    ) -> None:
        super().__init__(site, ("output",), "branch", "a bottleneck adapter is not linear in its input")
        # Whether there is a norm to look in front of depends on the site.
        self.reads_entry = reads == "stream" and bool(site.entry)  # type: ignore[misc]
        channels = site.out_features
        self.down_bias = new_parameter(host, torch.zeros(width))
        self.up_bias = new_parameter(host, torch.zeros(channels))
        self.norm_weight = self.norm_bias = None
        if layer_norm == "in":
            self.norm_weight = new_parameter(host, torch.ones(channels))
            self.norm_bias = new_parameter(host, torch.zeros(channels))
        self.scale = new_parameter(host, torch.ones(())) if scale is None else scale
        self.activation = activation
        self.dropout = dropout

    def matrices(self) -> tuple[Tensor, Tensor]:
        """D (h, C) and U (C, h) of this pass."""
        raise NotImplementedError(f"{type(self).__name__} does not say which matrices it applies")

    def branch(self, x: Tensor) -> Tensor:
        """The bottleneck's contribution; `x` and the result have the layout of the branch's output."""
        last = x.movedim(self.site.channel_axis, -1)
        if self.norm_weight is not None and self.norm_bias is not None:
            last = F.layer_norm(last, last.shape[-1:], self.norm_weight.to(x.dtype), self.norm_bias.to(x.dtype))
        down, up = self.matrices()
        hidden = activate(self.activation, F.linear(last, down.to(x.dtype), self.down_bias.to(x.dtype)))
        hidden = F.dropout(hidden, self.dropout, self.training)
        change = F.linear(hidden, up.to(hidden.dtype), self.up_bias.to(hidden.dtype))
        return (self.scale * change).movedim(-1, self.site.channel_axis)
