"""LoRA whose factors take a few bits per entry."""

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
from autopeft.core.site import Site
from autopeft.errors import UsageError
from autopeft.methods._host import new_parameter
from autopeft.methods._low_rank import LowRankAdapter
from autopeft.methods._quantiser import Quantiser, bit_cost, check_bits
from autopeft.methods._sizes import check_size
from autopeft.methods._spectrum import captured, squared_singular_values
from autopeft.methods._traits import LowRankSized
from autopeft.methods.codes import kept_energy

__all__ = ["BitLoRA", "BitLoRAAdapter"]


@dataclass(frozen=True, slots=True)
class BitLoRA(LowRankSized):
    """`W + scale * q(B) q(A)`, LoRA's factors A (r, in) and B (out, r) in codes of a few bits.

    Bi-LoRA of "Revisiting the Parameter Efficiency of Adapters from the Perspective of Precision Redundancy" (Jie et
    al., 2023, arXiv 2307.16867). Training keeps A and B in full precision and sees their codes; the exported file
    holds the codes, and a mean and a deviation per factor. A file of one size holds 32 times the rank at 1 bit. The
    paper adapts the query and value slices of a ViT.

    It starts near the pre-trained model and not at it: B is drawn with a deviation of 1e-3, since a B of zeros has no
    deviation to measure codes by.

    Attributes:
        bits: bits per entry, 1 to 8.
        scale: the factor s of the paper, the same at every rank.
        dropout: share of the r hidden values that training drops, 0.1 in the released code. Convolutions in groups and
            hosts that do not compute the plain product have no hidden values; they train without.
    """

    bits: int = 1
    scale: float = 1.0
    dropout: float = 0.0

    family: ClassVar[str] = "matrix"

    def __post_init__(self) -> None:
        check_bits("bit_lora", self.bits)
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise UsageError(f"bit_lora: scale must be a positive number, got {self.scale!r}")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"bit_lora: dropout must be at least 0 and below 1, got {self.dropout!r}")

    def cost(self, site: Site, size: int) -> Cost:
        """`r (in_features + out_features)`, stored in `bits` bits each and 64 bits per factor.

        Changes every entry of the weight.
        """
        r = check_size("bit_lora", site, size, self.sizes(site))
        return bit_cost(self.bits, (r * site.in_features, r * site.out_features), site.n_weight)

    def build(self, site: Site, option: Option, host: nn.Module, generator: torch.Generator) -> BitLoRAAdapter:
        """A drawn from the Kaiming uniform distribution of a Linear layer, B from a narrow normal one."""
        r = check_size("bit_lora", site, option.size, self.sizes(site))
        return BitLoRAAdapter(site, host, r, self, generator)

    def gains(self, site: Site, evidence: Evidence, sizes: Sequence[int]) -> tuple[float, ...]:
        """LoRA's gain, the r largest squared singular values of the signal, times what the codes keep of it.

        Codes of a factor with normal entries keep the share `kept_energy(bits)` of its energy (2 / pi for 1 bit), so
        those of both factors of the best rank-r step keep its square.
        """
        kept = kept_energy(self.bits) ** 2
        energies = squared_singular_values(evidence["weight"].signal.flatten(1))
        return tuple(kept * gain for gain in captured(energies, sizes))

    def mergeable(self, site: Site) -> bool:
        """Yes: the change is one of the host's own tensors."""
        return True


class BitLoRAAdapter(LowRankAdapter):
    """Factors `A` (r, in_features) and `B` (out_features, r), which act as their codes; stored as codes."""

    def __init__(self, site: Site, host: nn.Module, rank: int, method: BitLoRA, generator: torch.Generator) -> None:
        super().__init__(site, host)
        start = torch.empty(rank, site.in_features)
        nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator)
        self.A = new_parameter(host, start)
        up = torch.empty(site.out_features, rank)
        nn.init.trunc_normal_(up, std=1e-3, a=-2e-3, b=2e-3, generator=generator)
        self.B = new_parameter(host, up)
        self.scale = method.scale
        self.dropout = method.dropout
        self.quantiser = Quantiser(method.bits).to(self.A.device)

    def branch(self, x: Tensor) -> Tensor:
        """As the base class says, at rank r in both products."""
        down, up = self._factors()
        hidden = self.contract(x, down)
        if self.dropout:
            hidden = F.dropout(hidden, self.dropout, self.training)
        return self.expand(hidden, up)

    def delta(self) -> dict[str, Tensor]:
        """`scale * q(B) q(A)` as a tensor of the site's shape."""
        down, up = self._factors()
        return {"weight": (up @ down).view(self.site.shape)}

    def low_rank(self) -> tuple[Tensor, Tensor]:
        """`(q(A), scale * q(B))`."""
        down, up = self._factors()
        return down.detach(), up.detach()

    def stored(self) -> dict[str, Tensor]:
        """`packed`: A and then B; see `Quantiser.packed`."""
        return self.quantiser.packed({"A": self.A, "B": self.B})

    def load_stored(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up what `stored` gave.

        Raises:
            UsageError: for a missing, unknown or misshapen tensor.
        """
        self.quantiser.load({"A": self.A, "B": self.B}, tensors)

    def _factors(self) -> tuple[Tensor, Tensor]:
        down, up = self.quantiser("A", self.A), self.quantiser("B", self.B)
        return down, up if self.scale == 1.0 else self.scale * up
