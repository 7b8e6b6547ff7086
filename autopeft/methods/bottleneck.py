"""A bottleneck adapter behind one matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from autopeft.core.budget import Cost
from autopeft.core.menu import Option
from autopeft.core.scores import Evidence
from autopeft.core.site import Site, Slot
from autopeft.methods._bottleneck import BottleneckModule, bottleneck_size
from autopeft.methods._sizes import check_size, powers_of_two
from autopeft.methods._spectrum import captured, energy, squared_singular_values
from autopeft.methods._traits import ChoosesNothing

__all__ = ["BottleneckAdapter"]

_SLOPE_SQUARED = 0.25
"""Squared derivative of GELU at 0."""


@dataclass(frozen=True, slots=True)
class BottleneckAdapter(ChoosesNothing):
    """`y + U gelu(D y + d) + u` on the output of one Linear or convolution.

    SPT's structured adapter (He et al., 2023, arXiv 2303.08566, section 3.2). It cannot be merged. Sizes are bottleneck
    widths; on fc1 the adapter acts before the block's own activation.
    """

    family: ClassVar[str] = "adapter"

    def slots(self, site: Site) -> tuple[Slot, ...]:
        """`output` of a Linear or convolution whose adapter of width 1 is smaller than its weight."""
        return ("output",) if self.sizes(site) else ()

    def sizes(self, site: Site) -> tuple[int, ...]:
        """Powers of two up to half of the channels, as long as the adapter is smaller than the weight."""
        if not site.is_matrix or "output" not in site.slots:
            return ()
        out = site.out_features
        return powers_of_two(min(out // 2, (site.n_weight - 1 - out) // (2 * out + 1)))

    def cost(self, site: Site, size: int) -> Cost:
        """`2 out r + r + out`; added parameters count as entries, since no tensor of the model can hold them."""
        r = check_size("adapter", site, size, self.sizes(site))
        n = bottleneck_size(site.out_features, r)
        return Cost.plain(n, entries=n, tensors=4)

    def build(self, site: Site, option: Option, host: nn.Module, generator: torch.Generator) -> BottleneckModule:
        """D random, the others zero."""
        r = check_size("adapter", site, option.size, self.sizes(site))
        return BottleneckModule(site, host, r, generator)

    def gains(self, site: Site, evidence: Evidence, sizes: Sequence[int]) -> tuple[float, ...]:
        """The r largest squared singular values of `sum over tokens of dL/dy y^T`, times GELU's squared slope at 0.

        For `y = W x + b` that matrix is `G W^T + g_b b^T`. The gradient of u is `g_b`, so its energy comes on top.
        Without evidence on the bias both terms in `g_b` are left out. For convolutions and preconditioned signals the
        matrix is an approximation: G sums over positions and kernel entries as one.
        """
        weight = evidence["weight"]
        rows = site.out_features
        g, w = weight.signal.double().reshape(rows, -1), weight.value.double().reshape(rows, -1)
        bias, shift = evidence.get("bias"), 0.0
        if bias is not None:
            g = torch.cat((g, bias.signal.double()[:, None]), 1)
            w = torch.cat((w, bias.value.double()[:, None]), 1)
            shift = energy(bias.signal)
        spectrum = squared_singular_values(_product(g.cpu(), w.cpu()))
        return tuple(_SLOPE_SQUARED * top + shift for top in captured(spectrum, sizes))

    def mergeable(self, site: Site) -> bool:
        """No: a bottleneck is not linear in its input."""
        return False


def _product(g: Tensor, w: Tensor) -> Tensor:
    """A matrix with the singular values of `g @ w.T`; a narrow `w` is reduced to its triangular factor first."""
    if w.shape[0] > w.shape[1]:
        triangle: Tensor = torch.linalg.qr(w, mode="r").R
        return g @ triangle.T
    return g @ w.T
