"""A bottleneck beside a transformer's MLP whose matrices take a few bits per entry."""

from __future__ import annotations

import math
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
from autopeft.methods._host import new_parameter
from autopeft.methods._quantiser import Quantiser, bit_cost, check_bits
from autopeft.methods._sizes import check_size, powers_of_two
from autopeft.methods._spectrum import captured, squared_singular_values
from autopeft.methods._traits import ChoosesNothing
from autopeft.methods.base import Adapter
from autopeft.methods.codes import kept_energy

__all__ = ["BitAdaptFormer", "BitAdaptFormerModule"]

_SLOPE_SQUARED = 0.25
"""Squared mean derivative of ReLU: half of the hidden values are on."""


@dataclass(frozen=True, slots=True)
class BitAdaptFormer(ChoosesNothing):
    """`mlp(norm(x)) + scale * q(U) relu(q(D) x)`, D (h, C) and U (C, h) in codes of a few bits, without biases.

    Bi-AdaptFormer of "Revisiting the Parameter Efficiency of Adapters from the Perspective of Precision Redundancy"
    (Jie et al., 2023, arXiv 2307.16867). x is the residual stream as it is, in front of the MLP's norm. Training keeps
    D and U in full precision and sees their codes; the exported file holds the codes, and a mean and a deviation per
    matrix. It cannot be merged. What the block does to the MLP's output (LayerScale) is done to the sum.

    It starts near the pre-trained model and not at it: U is drawn with a deviation of 1e-3, since a U of zeros has no
    deviation to measure codes by.

    Attributes:
        bits: bits per entry, 1 to 8.
        scale: the factor s of the paper, which tries 0.01 to 100 per data set.
        dropout: share of the hidden values that training drops.
    """

    bits: int = 1
    scale: float = 1.0
    dropout: float = 0.1

    family: ClassVar[str] = "adapter"

    def __post_init__(self) -> None:
        check_bits("bit_adaptformer", self.bits)
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise UsageError(f"bit_adaptformer: scale must be a positive number, got {self.scale!r}")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"bit_adaptformer: dropout must be at least 0 and below 1, got {self.dropout!r}")

    def slots(self, site: Site) -> tuple[Slot, ...]:
        """`output` of a transformer block's MLP with a norm in front."""
        return ("output",) if self.sizes(site) else ()

    def sizes(self, site: Site) -> tuple[int, ...]:
        """Powers of two up to the number of channels: at 1 bit, wide ones are cheap to store."""
        offered = site.kind == "residual" and site.role == "mlp" and site.entry and "output" in site.slots
        return powers_of_two(site.out_features) if offered else ()

    def cost(self, site: Site, size: int) -> Cost:
        """`2 C h`, stored in `bits` bits each and 64 bits per matrix.

        Added parameters count as entries, since no tensor of the model can hold them.
        """
        n = site.out_features * check_size("bit_adaptformer", site, size, self.sizes(site))
        return bit_cost(self.bits, (n, n), entries=2 * n)

    def build(self, site: Site, option: Option, host: nn.Module, generator: torch.Generator) -> BitAdaptFormerModule:
        """D drawn from the Kaiming uniform distribution of a Linear layer, U from a narrow normal one."""
        h = check_size("bit_adaptformer", site, option.size, self.sizes(site))
        return BitAdaptFormerModule(site, host, h, self, generator)

    def gains(self, site: Site, evidence: Evidence, sizes: Sequence[int]) -> tuple[float, ...]:
        """The h largest squared singular values of `sum over tokens of dL/dy y^T`, times what ReLU and codes keep.

        ReLU keeps a quarter, the codes of each matrix `kept_energy(bits)`. y is the block's output, which stands in
        for the stream that the adapter reads: the scorers keep no product with that. Scorers that look at parameters
        alone keep no such evidence; the gain is then 0 for every size.
        """
        output = evidence.get("output")
        if output is None:
            return (0.0,) * len(sizes)
        kept = _SLOPE_SQUARED * kept_energy(self.bits) ** 2
        return tuple(kept * top for top in captured(squared_singular_values(output.signal), sizes))

    def mergeable(self, site: Site) -> bool:
        """No: a bottleneck is not linear in its input."""
        return False


class BitAdaptFormerModule(Adapter):
    """Matrices `down` (h, C) and `up` (C, h), which act as their codes; stored as codes."""

    reads_entry: ClassVar[bool] = True

    def __init__(
        self, site: Site, host: nn.Module, width: int, method: BitAdaptFormer, generator: torch.Generator
    ) -> None:
        super().__init__(site, ("output",), "branch", "a bottleneck adapter is not linear in its input")
        down, up = torch.empty(width, site.out_features), torch.empty(site.out_features, width)
        nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
        nn.init.trunc_normal_(up, std=1e-3, a=-2e-3, b=2e-3, generator=generator)
        self.down = new_parameter(host, down)
        self.up = new_parameter(host, up)
        self.scale = method.scale
        self.dropout = method.dropout
        self.quantiser = Quantiser(method.bits).to(self.down.device)

    def branch(self, x: Tensor) -> Tensor:
        """`scale * q(U) relu(q(D) x)` over the channels of the residual stream."""
        last = x.movedim(self.site.channel_axis, -1)
        hidden = F.relu(F.linear(last, self.quantiser("down", self.down).to(x.dtype)))
        hidden = F.dropout(hidden, self.dropout, self.training)
        up = self.scale * self.quantiser("up", self.up)
        return F.linear(hidden, up.to(hidden.dtype)).movedim(-1, self.site.channel_axis)

    def stored(self) -> dict[str, Tensor]:
        """`packed`: `down` and then `up`; see `Quantiser.packed`."""
        return self.quantiser.packed({"down": self.down, "up": self.up})

    def load_stored(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up what `stored` gave.

        Raises:
            UsageError: for a missing, unknown or misshapen tensor.
        """
        self.quantiser.load({"down": self.down, "up": self.up}, tensors)
