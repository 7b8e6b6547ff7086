"""TLoRA: a weight seen through a trained transform, plus a compact residual."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from autopeft.core.budget import Cost
from autopeft.core.menu import Option
from autopeft.core.scores import Evidence
from autopeft.core.site import Site, Slot
from autopeft.errors import UsageError
from autopeft.methods._host import new_parameter
from autopeft.methods._ring import factorise, ring_matrix, ring_outer
from autopeft.methods._sizes import check_size, half_octaves, powers_of_two
from autopeft.methods._spectrum import captured, energy, squared_singular_values
from autopeft.methods._traits import ChoosesNothing
from autopeft.methods._transform import project_on_transforms
from autopeft.methods.base import Adapter

__all__ = ["TLoRA", "TLoRAAdapter", "TLoRAResidual"]

TLoRAResidual = Literal["lora", "ring", "ring_matrix"]
"""What is added to the transformed weight."""


@dataclass(frozen=True, slots=True)
class TLoRA(ChoosesNothing):
    """`W T + s D`: T transforms the input and starts at the identity, D is a compact residual that starts at zero.

    Tao et al., 2025, arXiv 2501.08727 (also called TRA). T (in, in) is a tensor-ring matrix: with in = d_1 ... d_N,
    `T[(i..), (j..)] = trace(A_1[i_1, j_1] ... A_N[i_N, j_N])`, cores (d_i, d_i, R, R). The residual of size r is

    - `lora`: `B A` of rank r;
    - `ring`: a tensor ring of rank r over the modes (k_1, ..., k_N, d_1, ..., d_N), out = k_1 ... k_N ("ttv");
    - `ring_matrix`: a tensor-ring matrix of rank r with cores (k_i, d_i, r, r) ("ttm").

    Factors are the most even ones. A convolution's weight is flattened to (out, in / groups * kh * kw).

    The paper starts every core at `A_i[:, :, a, b] = I / R`, equal for all a and b: then all have the same gradient,
    stay equal, and any R trains no more than R = 1 does. So here `A_i[:, :, a, b]` is I times a random number with
    relative deviation `spread` around 1 / R, normalised to T = I; 0 gives the paper's start. Of `ring_matrix` neither
    paper nor code fixes the start of the cores: all but the first are normal with deviation `1 / (r sqrt(d_i))`.

    Attributes:
        residual: the kind of D.
        transform_rank: R.
        modes: N, the number of factors of a dimension.
        alpha: s is `alpha / sqrt(r)`; None means a scale of 1 at every size.
        strength: weight of the penalty `sum of ||A_i - start of A_i||^2`, which keeps T near the identity; 0 for none.
        spread: deviation of the start, from 0 to 0.5.
    """

    residual: TLoRAResidual = "lora"
    transform_rank: int = 2
    modes: int = 3
    alpha: float | None = None
    strength: float = 0.0
    spread: float = 0.1

    family: ClassVar[str] = "matrix"

    def __post_init__(self) -> None:
        if self.residual not in get_args(TLoRAResidual):
            raise UsageError(
                f"tlora: residual must be one of {', '.join(get_args(TLoRAResidual))}, got {self.residual!r}"
            )
        for name, value in (("transform_rank", self.transform_rank), ("modes", self.modes)):
            if value < 1:
                raise UsageError(f"tlora: {name} must be at least 1, got {value!r}")
        if self.alpha is not None and not (math.isfinite(self.alpha) and self.alpha > 0):
            raise UsageError(f"tlora: alpha must be a positive number or null (scale 1), got {self.alpha!r}")
        if not (math.isfinite(self.strength) and self.strength >= 0):
            raise UsageError(f"tlora: strength must be a number of at least 0, got {self.strength!r}")
        if not 0 <= self.spread <= 0.5:
            raise UsageError(f"tlora: spread must lie between 0 and 0.5, got {self.spread!r}")

    def slots(self, site: Site) -> tuple[Slot, ...]:
        """`weight` of a Linear or Conv2d that is larger than the transform with a residual of size 1."""
        return ("weight",) if self.sizes(site) else ()

    def sizes(self, site: Site) -> tuple[int, ...]:
        """Sizes of the residual at which all that is trained has fewer entries than the weight.

        Powers of two for `lora`; 1, 2, 3, 4, 6, 8, ... for the others. Since a `ring` of rank r is a matrix of rank
        r^2, it ends where r^2 reaches the smaller dimension.
        """
        if not site.is_matrix or "weight" not in site.slots:
            return ()
        smaller = min(site.in_features, site.out_features)
        if self.residual == "lora":
            candidates = powers_of_two(smaller)
        else:
            candidates = half_octaves(math.isqrt(smaller - 1) + 1 if self.residual == "ring" else smaller)
        transform = self._transform_count(site)
        return tuple(r for r in candidates if transform + self._residual_count(site, r) < site.n_weight)

    def _transform_count(self, site: Site) -> int:
        return self.transform_rank**2 * sum(d * d for d in factorise(site.in_features, self.modes))

    def _residual_count(self, site: Site, size: int) -> int:
        if self.residual == "lora":
            return size * (site.in_features + site.out_features)
        outer, inner = factorise(site.out_features, self.modes), factorise(site.in_features, self.modes)
        if self.residual == "ring":
            return size**2 * (sum(outer) + sum(inner))
        return size**2 * sum(k * d for k, d in zip(outer, inner, strict=True))

    def cost(self, site: Site, size: int) -> Cost:
        """`R^2 sum of d_i^2`, and the residual's `r (in + out)`, `r^2 (sum of k_i + d_i)` or `r^2 sum of k_i d_i`."""
        r = check_size("tlora", site, size, self.sizes(site))
        count = self._transform_count(site) + self._residual_count(site, r)
        residual = {"lora": 2, "ring": 2 * self.modes, "ring_matrix": self.modes}[self.residual]
        return Cost.plain(count, entries=site.n_weight, tensors=self.modes + residual)

    def mergeable(self, site: Site) -> bool:
        """Yes: the change is one of the host's own tensors."""
        return True

    def build(self, site: Site, option: Option, host: nn.Module, generator: torch.Generator) -> TLoRAAdapter:
        """T the identity, the residual's first output factor zero, the other factors drawn."""
        r = check_size("tlora", site, option.size, self.sizes(site))
        return TLoRAAdapter(site, host, r, self, generator)

    def gains(self, site: Site, evidence: Evidence, sizes: Sequence[int]) -> tuple[float, ...]:
        """Energy of the signal that the transform's first step captures, and what the residual does of the rest.

        The first is an exact projection on `{W dT}`, the same at every R. Of the rest S, `lora` captures the r largest
        squared singular values, the best there is; for the other two it is the expectation p / n ||S||^2 of a blind
        space of as many dimensions p as the residual has parameters, n entries in all.
        """
        known = evidence["weight"]
        held, rest = project_on_transforms(known.value, known.signal, factorise(site.in_features, self.modes))
        if self.residual == "lora":
            return tuple(held + gain for gain in captured(squared_singular_values(rest), sizes))
        shares = (min(1.0, self._residual_count(site, size) / site.n_weight) for size in sizes)
        return tuple(held + share * energy(rest) for share in shares)


class TLoRAAdapter(Adapter):
    """`cores` of T; and those of the residual: `A` (r, in) and `B` (out, r), or `rows` and `columns`, or `cells`.

    The numbers (N, R, R) that multiply the identity at the start are kept as `mixing`, which is not saved: the penalty
    alone looks at them.
    """

    mixing: Tensor

    def __init__(self, site: Site, host: nn.Module, size: int, method: TLoRA, generator: torch.Generator) -> None:
        super().__init__(site, ("weight",), "swap")
        inner, outer = factorise(site.in_features, method.modes), factorise(site.out_features, method.modes)
        mixing = _mixing(method, generator)
        self.cores = _parameters(
            host, [torch.eye(d, dtype=m.dtype)[:, :, None, None] * m for d, m in zip(inner, mixing, strict=True)]
        )
        self.register_buffer("mixing", mixing.to(self.cores[0]), persistent=False)
        self.residual = method.residual
        self.strength = method.strength
        self.scale = 1.0 if method.alpha is None else method.alpha / math.sqrt(size)
        if self.residual == "lora":
            start = torch.empty(size, site.in_features)
            nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator)
            self.A = new_parameter(host, start)
            self.B = new_parameter(host, torch.zeros(site.out_features, size))
        elif self.residual == "ring":
            self.rows = _parameters(
                host, _drawn([(k, size, size) for k in outer], [math.sqrt(k) / size**2 for k in outer], generator)
            )
            nn.init.zeros_(self.rows[0])
            self.columns = _parameters(
                host, _drawn([(d, size, size) for d in inner], [1 / math.sqrt(d) for d in inner], generator)
            )
        else:
            shapes = [(k, d, size, size) for k, d in zip(outer, inner, strict=True)]
            self.cells = _parameters(host, _drawn(shapes, [1 / (size * math.sqrt(d)) for d in inner], generator))
            nn.init.zeros_(self.cells[0])

    def transform_change(self) -> Tensor:
        """`T - I`, (in_features, in_features)."""
        transform = ring_matrix(list(self.cores))
        return transform - torch.eye(len(transform), dtype=transform.dtype, device=transform.device)

    def residual_change(self) -> Tensor:
        """`s D`, (out_features, in_features)."""
        if self.residual == "lora":
            change = self.B @ self.A
        elif self.residual == "ring":
            down, up = ring_outer(list(self.rows), list(self.columns))
            change = up @ down
        else:
            change = ring_matrix(list(self.cells))
        return self.scale * change

    def merge(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`W + W (T - I) + s D`: a small change is not lost when autocast rounds the product's factors."""
        weight = tensors["weight"]
        matrix = weight.flatten(1).to(self.cores[0].dtype)
        changed = matrix + matrix @ self.transform_change() + self.residual_change()
        return {**tensors, "weight": changed.view(weight.shape).to(weight.dtype)}

    def penalty(self) -> Tensor | None:
        """`strength` times the squared distance of T's cores from their start; None when the strength is 0."""
        if not self.strength:
            return None
        total = self.mixing.new_zeros(())
        for core, mixing in zip(self.cores, self.mixing, strict=True):
            eye = torch.eye(len(core), dtype=core.dtype, device=core.device)
            total = total + (core - eye[:, :, None, None] * mixing).square().sum()
        return self.strength * total


def _mixing(method: TLoRA, generator: torch.Generator) -> Tensor:
    """Numbers (N, R, R), float64, whose matrix product has the trace 1."""
    rank = method.transform_rank
    mixing = torch.full((method.modes, rank, rank), 1 / rank, dtype=torch.float64)
    if rank > 1 and method.spread:
        # Uniform, not normal: no draw is so far out that the trace could come near zero.
        noise = torch.rand(mixing.shape, generator=generator, dtype=torch.float64) * 2 - 1
        mixing = mixing * (1 + math.sqrt(3) * method.spread * noise)
        product = torch.linalg.multi_dot(list(mixing)) if method.modes > 1 else mixing[0]
        mixing = torch.cat((mixing[:-1], mixing[-1:] / product.trace()))
    return mixing


def _drawn(shapes: Sequence[tuple[int, ...]], deviations: Sequence[float], generator: torch.Generator) -> list[Tensor]:
    return [std * torch.randn(shape, generator=generator) for shape, std in zip(shapes, deviations, strict=True)]


def _parameters(host: nn.Module, starts: Sequence[Tensor]) -> nn.ParameterList:
    return nn.ParameterList([new_parameter(host, start) for start in starts])
