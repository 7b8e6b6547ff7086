"""R-AMT: a trained binary mask on the weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import Function

from autopeft.core.budget import Cost
from autopeft.core.menu import Option
from autopeft.core.scores import Evidence
from autopeft.core.site import Site, Slot
from autopeft.errors import UsageError
from autopeft.methods._host import host_tensor, new_parameter, rows_of
from autopeft.methods._single import SingleSize
from autopeft.methods._sizes import check_size
from autopeft.methods.base import Adapter
from autopeft.methods.codes import pack, unpack

__all__ = ["RAMT", "MaskAdapter"]


@dataclass(frozen=True, slots=True)
class RAMT(SingleSize):
    """`W * 1[M > threshold]`: real scores M of the weight's shape are trained, W is frozen (R-AMT).

    Zheng et al., 2023, arXiv 2307.15049. The step passes gradients straight through, so that M's
    gradient is that of the masked weight times W. All scores start above the threshold: the mask starts as all ones,
    an exact identity. The penalty `weight_penalty * |M|_2` per tensor pulls scores towards zero, and so below the
    threshold. As many scalars are trained as are masked, which only large budgets pay for in `trainable`; stored is
    one bit each, which is what budgets in bytes see.

    The paper masks CLIP's attention projections and patch embedding. Its gradient dropout by the frozen model's
    predictions shapes gradients and not the part, and is a regulariser of its own.

    Attributes:
        start: where all scores start.
        threshold: scores above it keep their weight.
        weight_penalty: weight of the norm of the scores in the loss; 0 adds nothing.

    Raises:
        UsageError: for a start that is not above the threshold, or a negative or infinite value.
    """

    start: float = 0.01
    threshold: float = 0.005
    weight_penalty: float = 1e-4
    family: ClassVar[str] = "entries"

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < self.start < math.inf:
            raise UsageError(
                f"start of ramt must be above its threshold and the threshold not negative, so that training starts "
                f"with every weight; got start {self.start} and threshold {self.threshold}"
            )
        if not 0 <= self.weight_penalty < math.inf:
            raise UsageError(f"weight_penalty of ramt must be finite and at least 0, got {self.weight_penalty}")

    def slots(self, site: Site) -> tuple[Slot, ...]:
        """`weight` of a Linear or convolution."""
        return ("weight",) if site.is_matrix and "weight" in site.slots else ()

    def cost(self, site: Site, size: int) -> Cost:
        """A trained score per weight; one bit of each is stored, in whole bytes."""
        check_size("ramt", site, size, self.sizes(site))
        packed = -(-site.n_weight // 8)
        return Cost(site.n_weight, packed, 8 * packed, site.n_weight, 1)

    def build(self, site: Site, option: Option, host: nn.Module, generator: torch.Generator) -> MaskAdapter:
        """Every score at `start`; nothing is random."""
        check_size("ramt", site, option.size, self.sizes(site))
        return MaskAdapter(site, host, self)

    def gains(self, site: Site, evidence: Evidence, sizes: Sequence[int]) -> tuple[float, ...]:
        """Energy of the signal where its sign is the weight's.

        From all ones a mask can only shrink a weight to zero, so that the changes it can make form a cone; this is the
        energy of the signal's descent direction projected on that cone.
        """
        known = evidence["weight"]
        downhill = (known.signal * known.value) > 0
        return (float(known.signal.detach().double()[downhill].square().sum()),) * len(sizes)


class MaskAdapter(Adapter):
    """Scores `M` of the site's shape, above the threshold where the weight is kept."""

    def __init__(self, site: Site, host: nn.Module, method: RAMT) -> None:
        super().__init__(site, ("weight",), "swap")
        self._start, self._threshold, self._weight = method.start, method.threshold, method.weight_penalty
        shape = rows_of(site, host_tensor(site, host, site.parameter)).shape
        self.M = new_parameter(host, torch.full(shape, self._start))

    def mask(self) -> Tensor:
        """What is kept, boolean."""
        return self.M.detach() > self._threshold

    def merge(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weight with the others zero."""
        kept: Tensor = _Step.apply(self.M, self._threshold)
        return {**tensors, "weight": tensors["weight"] * kept.to(tensors["weight"].dtype)}

    def penalty(self) -> Tensor | None:
        """`weight_penalty * |M|_2`."""
        return self._weight * torch.linalg.vector_norm(self.M) if self._weight else None

    def stored(self) -> dict[str, Tensor]:
        """`mask`: one bit per weight, uint8 of shape (ceil(n / 8),), the first weight's the highest of its byte."""
        return {"mask": torch.from_numpy(pack(self.mask().flatten().cpu().numpy().astype(np.uint8), 1))}

    def load_stored(self, tensors: Mapping[str, Tensor]) -> None:
        """Scores at their start where the weight is kept, at zero elsewhere."""
        length = -(-self.M.numel() // 8)
        if set(tensors) != {"mask"} or tensors["mask"].shape != (length,) or tensors["mask"].dtype != torch.uint8:
            raise UsageError(
                f"the mask of {self.site.name} is `mask`, uint8 of shape ({length},); the file has "
                f"{', '.join(f'{n} {t.dtype} {tuple(t.shape)}' for n, t in tensors.items()) or 'nothing'}"
            )
        kept = torch.from_numpy(unpack(tensors["mask"].cpu().numpy(), 1, self.M.numel())).view(self.M.shape)
        with torch.no_grad():
            self.M.copy_(kept * self._start)


class _Step(Function):
    """1 above the threshold and 0 below; the gradient passes as if it were the identity."""

    @staticmethod
    def forward(scores: Tensor, threshold: float) -> Tensor:
        """Ones and zeros in the scores' dtype."""
        return (scores > threshold).to(scores.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Nothing to keep."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Straight through."""
        return grad, None
