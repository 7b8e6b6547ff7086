"""RepAdapter: a linear bottleneck in front of a projection, that merges into it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autopeft.core.budget import Cost
from autopeft.core.menu import Option
from autopeft.core.scores import Evidence
from autopeft.core.site import Site, Slot
from autopeft.errors import UsageError
from autopeft.methods._host import is_plain, new_parameter
from autopeft.methods._parallel import check_dropout, check_scale
from autopeft.methods._sizes import check_size
from autopeft.methods._spectrum import captured, energy, squared_singular_values
from autopeft.methods._traits import ChoosesNothing
from autopeft.methods.base import Adapter

__all__ = ["RepAdapter", "RepAdapterModule"]


@dataclass(frozen=True, slots=True)
class RepAdapter(ChoosesNothing):
    """`W x' + b` with `x' = x + s (U (D x + d) + u)`, U sparse in groups: in front of qkv and of fc1.

    Luo et al., 2023, arXiv 2302.08106. Everything is linear, so that it merges exactly:
    `W (I + s U D)` and `b + s W (U d + u)`. U is a grouped 1x1 convolution: the g-th part of the channels sees the g-th
    part of the h hidden values; where h is no multiple of the groups, neighbouring parts overlap by one. Sizes are
    widths h.

    Attributes:
        scale: s; the paper picks 0.1, 0.5, 1, 5 or 10 per data set.
        groups: parts of U, 2 in the paper; 1 is dense.
        roles: roles of the Linear layers it goes in front of. Models with separate projections of queries, keys and
            values have `attn.q`, `attn.k` and `attn.v`.
        dropout: share of the hidden values that training drops.
    """

    scale: float = 1.0
    groups: int = 2
    roles: tuple[str, ...] = ("attn.qkv", "mlp.fc1")
    dropout: float = 0.0

    family: ClassVar[str] = "adapter"

    def __post_init__(self) -> None:
        check_scale("repadapter", self.scale)
        check_dropout("repadapter", self.dropout)
        if self.groups < 1:
            raise UsageError(f"repadapter: groups must be at least 1, got {self.groups!r}")
        if not self.roles:
            raise UsageError("repadapter: roles is empty, so it could go nowhere; name at least one, such as mlp.fc1")

    def slots(self, site: Site) -> tuple[Slot, ...]:
        """`weight`, and `bias` where there is one, of a whole Linear of one of the roles."""
        if not self.sizes(site):
            return ()
        return ("weight", "bias") if site.has_bias else ("weight",)

    def sizes(self, site: Site) -> tuple[int, ...]:
        """The groups times powers of two up to half of the inputs."""
        # All rows of a fused projection share one input: there is none of a slice alone.
        fits = site.kind == "linear" and site.rows is None and site.role in self.roles and "weight" in site.slots
        if not fits or site.in_features < 2 * self.groups:
            return ()
        return tuple(self.groups << i for i in range((site.in_features // 2 // self.groups).bit_length()))

    def cost(self, site: Site, size: int) -> Cost:
        """`C h + h + C ceil(h / groups) + C`; merged, it changes every entry of weight and bias."""
        h, channels = check_size("repadapter", site, size, self.sizes(site)), site.in_features
        n = channels * h + h + channels * -(-h // self.groups) + channels
        return Cost.plain(n, entries=site.n_weight + site.n_bias, tensors=4)

    def mergeable(self, site: Site) -> bool:
        """Where the host has a bias that the shift can go into."""
        return site.has_bias

    def build(self, site: Site, option: Option, host: nn.Module, generator: torch.Generator) -> RepAdapterModule:
        """D drawn from the Xavier uniform distribution, U and the biases zero: an identity."""
        h = check_size("repadapter", site, option.size, self.sizes(site))
        return RepAdapterModule(self, site, host, h, generator)

    def gains(self, site: Site, evidence: Evidence, sizes: Sequence[int]) -> tuple[float, ...]:
        """The energy of the gradients of U and u at the best orthonormal D, from those of weight and bias.

        The gradient of the map U D is `W^T G`. A part of U reaches its own rows of it with its own part of D, so that
        it captures the `h / groups` largest squared singular values of these rows. The gradient of u is `W^T g_b`, left
        out where there is no evidence on the bias. The scale is left out: it changes the size of a step.
        """
        weight, bias = evidence["weight"], evidence.get("bias")
        w, g = weight.value.detach().cpu().double(), weight.signal.detach().cpu().double()
        shift = 0.0 if bias is None else energy(w.T @ bias.signal.detach().cpu().double())
        ranks = [-(-size // self.groups) for size in sizes]
        parts = [captured(squared_singular_values(rows), ranks) for rows in torch.tensor_split(w.T @ g, self.groups)]
        return tuple(shift + sum(energies) for energies in zip(*parts, strict=True))


class RepAdapterModule(Adapter):
    """`down_weight` D (h, C), `down_bias` d (h,), `up_weight` U (C, ceil(h / groups)), `up_bias` u (C,)."""

    def __init__(self, method: RepAdapter, site: Site, host: nn.Module, width: int, generator: torch.Generator) -> None:
        obstacle = ""
        if not site.has_bias:
            obstacle = "the host has no bias that the shift could go into"
        elif not is_plain(host):
            obstacle = f"a {type(host).__name__} is no plain Linear"
        super().__init__(site, ("weight", "bias") if site.has_bias else ("weight",), "input", obstacle)
        channels = site.in_features
        part = -(-width // method.groups)
        self.down_weight = new_parameter(
            host, nn.init.xavier_uniform_(torch.empty(width, channels), generator=generator)
        )
        self.down_bias = new_parameter(host, torch.zeros(width))
        self.up_weight = new_parameter(host, torch.zeros(channels, part))
        self.up_bias = new_parameter(host, torch.zeros(channels))
        self.scale = method.scale
        self.groups = method.groups
        self.dropout = method.dropout

    def _starts(self) -> list[int]:
        """The first hidden value that each part of U sees; the last part ends with the last one."""
        width, part = len(self.down_bias), self.up_weight.shape[1]
        return [round(i * (width - part) / max(1, self.groups - 1)) for i in range(self.groups)]

    def _expand(self, hidden: Tensor) -> Tensor:
        """`U` times the hidden values, (..., h) to (..., C)."""
        part = self.up_weight.shape[1]
        ups = torch.tensor_split(self.up_weight.to(hidden.dtype), self.groups)
        pieces = [
            F.linear(hidden[..., start : start + part], up) for start, up in zip(self._starts(), ups, strict=True)
        ]
        return torch.cat(pieces, -1)

    def receive(self, x: Tensor) -> Tensor:
        """`x + s (U (D x + d) + u)`."""
        hidden = F.linear(x, self.down_weight.to(x.dtype), self.down_bias.to(x.dtype))
        hidden = F.dropout(hidden, self.dropout, self.training)
        return x + (self.scale * (self._expand(hidden) + self.up_bias.to(hidden.dtype))).to(x.dtype)

    def merge(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`W (I + s U D)` and `b + s W (U d + u)`."""
        weight, bias = tensors["weight"], tensors["bias"]
        wide = weight.to(self.down_weight.dtype)
        change = wide @ self._expand(self.down_weight.T).T
        shift = wide @ (self._expand(self.down_bias) + self.up_bias)
        return {
            **tensors,
            "weight": (wide + self.scale * change).to(weight.dtype),
            "bias": (bias.to(wide.dtype) + self.scale * shift).to(bias.dtype),
        }
