"""DoRA: LoRA on the directions of a weight's rows, and their lengths beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from autopeft.core.budget import Cost
from autopeft.core.menu import Option
from autopeft.core.scores import Evidence
from autopeft.core.site import Site, Slot
from autopeft.methods._axis import along
from autopeft.methods._host import host_tensor, new_parameter, rows_of
from autopeft.methods._scaling import Scaling, lora_scale
from autopeft.methods._sizes import check_size, powers_of_two
from autopeft.methods._spectrum import captured, squared_singular_values
from autopeft.methods._traits import ChoosesNothing
from autopeft.methods.base import Adapter

__all__ = ["DoRA", "DoRAAdapter"]


@dataclass(frozen=True, slots=True)
class DoRA(ChoosesNothing):
    """`m (W + s B A) / ||W + s B A||`, row by row, with A, B and the lengths m trained.

    Liu et al., 2024, arXiv 2402.09353, equation 5. m starts at `||W||`, B at zero: an exact identity. What is trained
    is `m - ||W||`, so that weight decay pulls towards W; without it the training is the same. A row of the weight is
    one output feature, or one output channel with all of its kernel.

    Attributes:
        alpha: numerator of the scale s; None means a scale of 1 at every rank, `1 / sqrt(r)` with `sqrt`.
        detach_norm: treat the norm in the denominator as a constant in the backward pass, as equation 11 of the paper
            and its code do; False takes the whole gradient.
        scaling: `rank` for `s = alpha / r`, `sqrt` for `s = alpha / sqrt(r)` (rsLoRA).
    """

    alpha: float | None = None
    detach_norm: bool = True
    scaling: Scaling = "rank"

    family: ClassVar[str] = "matrix"

    def __post_init__(self) -> None:
        lora_scale("dora", self.alpha, self.scaling, 1)

    def slots(self, site: Site) -> tuple[Slot, ...]:
        """`weight` of a Linear or Conv2d that is larger than factors of rank 1 with the lengths."""
        return ("weight",) if self.sizes(site) else ()

    def sizes(self, site: Site) -> tuple[int, ...]:
        """Powers of two at which all that is trained has fewer entries than the weight itself."""
        if not site.is_matrix or "weight" not in site.slots:
            return ()
        rest = site.n_weight - 1 - site.out_features
        return powers_of_two(rest // (site.in_features + site.out_features))

    def cost(self, site: Site, size: int) -> Cost:
        """`r (in_features + out_features) + out_features`; changes every entry of the weight."""
        r = check_size("dora", site, size, self.sizes(site))
        count = r * (site.in_features + site.out_features) + site.out_features
        return Cost.plain(count, entries=site.n_weight, tensors=3)

    def mergeable(self, site: Site) -> bool:
        """Yes: the change is one of the host's own tensors."""
        return True

    def build(self, site: Site, option: Option, host: nn.Module, generator: torch.Generator) -> DoRAAdapter:
        """A drawn from the Kaiming uniform distribution of a Linear layer, B and the change of the lengths zero."""
        r = check_size("dora", site, option.size, self.sizes(site))
        scale = lora_scale("dora", self.alpha, self.scaling, r)
        adapter = DoRAAdapter(site, host, r, scale, self.detach_norm, generator)
        adapter.rank_in_scale = self.scaling == "sqrt"
        return adapter

    def gains(self, site: Site, evidence: Evidence, sizes: Sequence[int]) -> tuple[float, ...]:
        """The signal's energy along W in every row, and the r largest squared singular values of what remains.

        Moving the lengths captures the first, the best rank-r step on the directions the second.
        """
        known = evidence["weight"]
        signal, value = (t.detach().flatten(1).to("cpu", torch.float64) for t in (known.signal, known.value))
        length = torch.linalg.vector_norm(value, dim=1, keepdim=True)
        direction = value / torch.where(length > 0, length, 1.0)
        radial = (signal * direction).sum(1, keepdim=True)
        energies = squared_singular_values(signal - radial * direction)
        lengths = float(radial.square().sum())
        return tuple(lengths + gain for gain in captured(energies, sizes))


class DoRAAdapter(Adapter):
    """Factors `A` (r, in_features) and `B` (out_features, r); `magnitude` (out_features,), the change of the lengths.

    The lengths `norm` (out_features,) of the weight's rows are computed again from the host and not saved. The weight
    is made on every pass, so the host runs with it in place of its own.
    """

    norm: Tensor

    def __init__(
        self, site: Site, host: nn.Module, rank: int, scale: float, detach_norm: bool, generator: torch.Generator
    ) -> None:
        super().__init__(site, ("weight",), "swap")
        start = torch.empty(rank, site.in_features)
        nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator)
        self.A = new_parameter(host, start)
        self.B = new_parameter(host, torch.zeros(site.out_features, rank))
        self.magnitude = new_parameter(host, torch.zeros(site.out_features))
        self.scale = scale
        self.detach_norm = detach_norm
        weight = rows_of(site, host_tensor(site, host, site.parameter)).detach().to(self.A.dtype)
        self.register_buffer("norm", _lengths(weight), persistent=False)

    def merge(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weight with new directions and lengths."""
        weight = tensors["weight"]
        moved = weight.to(self.A.dtype) + (self.scale * (self.B @ self.A)).view(weight.shape)
        length = _lengths(moved.detach() if self.detach_norm else moved)
        # A row of zeros (a pruned channel) has no direction; it stays zero instead of becoming NaN.
        ratio = (self.norm + self.magnitude) / length.clamp_min(torch.finfo(length.dtype).tiny)
        return {**tensors, "weight": (along(ratio, moved.ndim, 0) * moved).to(weight.dtype)}


def _lengths(weight: Tensor) -> Tensor:
    """Euclidean norm of every row, (rows,)."""
    lengths: Tensor = torch.linalg.vector_norm(weight.flatten(1), dim=1)
    return lengths
