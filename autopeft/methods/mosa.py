"""MoSA: a bottleneck beside the MLP, trained as a mixture of sparse ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from autopeft.core.budget import Cost
from autopeft.core.menu import Option
from autopeft.core.scores import Evidence
from autopeft.core.site import Site, Slot
from autopeft.errors import UsageError
from autopeft.methods._bottleneck import bottleneck_size
from autopeft.methods._drawn import own_generator
from autopeft.methods._host import new_parameter
from autopeft.methods._parallel import (
    LayerNormAt,
    ParallelBottleneck,
    Reads,
    branch_gains,
    branch_sizes,
    check_dropout,
    check_scale,
    kaiming,
)
from autopeft.methods._sizes import check_size
from autopeft.methods._traits import ChoosesNothing

__all__ = ["MoSA", "MoSAAdapter"]

_MOST_EXPERTS = 255
"""Owners are kept as bytes."""


@dataclass(frozen=True, slots=True)
class MoSA(ChoosesNothing):
    """`mlp(norm(x)) + s (U gelu(D norm'(x) + d) + u)`, whose matrices are trained through experts of disjoint entries.

    Zhang et al., 2023, arXiv 2312.02923. Every entry of a matrix that is split belongs to one of E experts,
    drawn at random. Expert e is `start + mask_e * delta`; a training pass runs one expert, drawn uniformly for each
    matrix, layer and pass, so that sparse adapters are trained one at a time. In evaluation the experts are averaged:
    `start + delta / E`, the expectation of the random expert. As the masks are disjoint, one delta holds all experts,
    and training takes no more parameters than the dense adapter that is deployed (the released code keeps E copies of
    the matrix and masks their gradients). It cannot be merged into the model. Sizes are bottleneck widths h.

    Experts are drawn from torch's global generator on the adapter's device. The paper's objective adds the symmetric
    KL divergence between the predictions of two passes, with other experts each: the regulariser `consistency`.

    Attributes:
        experts: E, 4 in the paper.
        split: which matrices are split. `up` shares D between the experts, the hierarchical form of the released
            recipes; `both` and `down` are the other forms.
        scale: s.
        reads: `stream` feeds x as it is, `norm` what the MLP is given.
        layer_norm: `in` gives the adapter a LayerNorm norm' of its own, 2 C parameters more.
        dropout: share of the hidden values that training drops.
        seed: seed of a D that is split; its start is drawn again when a plan is loaded, and not stored.
    """

    experts: int = 4
    split: Literal["up", "down", "both"] = "up"
    scale: float = 0.1
    reads: Reads = "stream"
    layer_norm: LayerNormAt = "in"
    dropout: float = 0.1
    seed: int = 0

    family: ClassVar[str] = "adapter"

    def __post_init__(self) -> None:
        if not 1 <= self.experts <= _MOST_EXPERTS:
            raise UsageError(f"mosa: experts must lie between 1 and {_MOST_EXPERTS}, got {self.experts!r}")
        check_scale("mosa", self.scale)
        check_dropout("mosa", self.dropout)

    def slots(self, site: Site) -> tuple[Slot, ...]:
        """`output` of an MLP that is a residual branch."""
        return ("output",) if self.sizes(site) else ()

    def sizes(self, site: Site) -> tuple[int, ...]:
        """Powers of two up to half of the channels, where every expert gets at least one entry."""
        return branch_sizes(site, ("mlp",)) if site.out_features >= self.experts else ()

    def cost(self, site: Site, size: int) -> Cost:
        """`2 C h + h + C`, and `2 C` for a LayerNorm: that of the dense adapter, whatever the number of experts.

        Added parameters count as entries, since no tensor of the model can hold them.
        """
        h, normed = check_size("mosa", site, size, self.sizes(site)), self.layer_norm == "in"
        n = bottleneck_size(site.out_features, h) + 2 * site.out_features * normed
        return Cost.plain(n, entries=n, tensors=4 + 2 * normed)

    def mergeable(self, site: Site) -> bool:
        """No: the experts merge into one adapter, which is not linear in its input."""
        return False

    def build(self, site: Site, option: Option, host: nn.Module, generator: torch.Generator) -> MoSAAdapter:
        """D drawn from the Kaiming uniform distribution of a Linear layer, U and the biases zero: an identity."""
        h = check_size("mosa", site, option.size, self.sizes(site))
        return MoSAAdapter(self, site, host, h, generator)

    def gains(self, site: Site, evidence: Evidence, sizes: Sequence[int]) -> tuple[float, ...]:
        """A proxy: 1/4 of the h largest squared singular values of the block's `sum over tokens of dL/dy y^T`.

        What is deployed is a dense adapter, so that all experts together span what it spans; that one pass moves one
        of E, and that averages are taken, only changes the size of a step. Without such evidence the gain is 0.
        """
        return branch_gains(evidence, sizes)


class MoSAAdapter(ParallelBottleneck):
    """As the base class says, with `down_weight` (h, C) and `up_weight` (C, h), which are the deltas where split.

    Buffers that are not saved: `down_owner` and `up_owner`, the expert of each entry of a split matrix, which training
    alone needs; `down_start`, where a split D starts.
    """

    down_start: Tensor | None
    down_owner: Tensor | None
    up_owner: Tensor | None

    def __init__(self, method: MoSA, site: Site, host: nn.Module, width: int, generator: torch.Generator) -> None:
        super().__init__(
            site,
            host,
            width,
            reads=method.reads,
            layer_norm=method.layer_norm,
            activation="gelu",
            dropout=method.dropout,
            scale=method.scale,
        )
        channels = site.out_features
        self.experts = method.experts
        # A shared D has no gradient before an expert is drawn again whose part of U has moved.
        self.patience = 2 if method.split == "down" else method.experts + 1
        split_down, split_up = method.split != "up", method.split != "down"
        down = kaiming(width, channels, own_generator(method.seed, site.name) if split_down else generator)
        self.down_weight = new_parameter(host, torch.zeros(width, channels) if split_down else down)
        self.up_weight = new_parameter(host, torch.zeros(channels, width))
        self._keep("down_start", down.to(self.down_weight, copy=True) if split_down else None)
        for name, split in (("down", split_down), ("up", split_up)):
            weight = getattr(self, f"{name}_weight")
            owner = _owners(weight.shape, method.experts, generator).to(weight.device) if split else None
            self._keep(f"{name}_owner", owner)

    def _keep(self, name: str, tensor: Tensor | None) -> None:
        self.register_buffer(name, tensor, persistent=False)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """One random expert of each matrix in training, their average in evaluation."""
        down = self._blend(self.down_weight, self.down_owner)
        if self.down_start is not None:
            down = self.down_start + down
        return down, self._blend(self.up_weight, self.up_owner)

    def _blend(self, delta: Tensor, owner: Tensor | None) -> Tensor:
        if owner is None:
            return delta
        if not self.training:
            return delta / self.experts
        # Drawn on the device, so that no training step waits for the host.
        expert = torch.randint(self.experts, (1,), device=owner.device)
        return torch.where(owner == expert, delta, 0.0)


def _owners(shape: torch.Size, experts: int, generator: torch.Generator) -> Tensor:
    """The expert of every entry, uint8: random parts of equal size, but for one entry."""
    count = shape.numel()
    order = torch.randperm(count, generator=generator)
    return (order * experts // count).to(torch.uint8).view(shape)
