"""DiffFit: a block's biases and norms, and one factor per residual branch."""

from __future__ import annotations

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
from autopeft.methods._dense import DenseAdapter
from autopeft.methods._grouped import Grouped, member_evidence
from autopeft.methods._host import host_tensor, is_linear_in_weight, new_parameter
from autopeft.methods._sizes import check_size
from autopeft.methods._spectrum import energy
from autopeft.methods.base import Adapter, Shared

__all__ = ["BranchScale", "DiffFit", "DiffFitShared"]


@dataclass(frozen=True, slots=True)
class DiffFit(Grouped):
    """All biases and norm affines of one block, and a factor gamma on each of its residual branches.

    Xie et al., 2023, arXiv 2304.06648. The factor is put where it can be merged, on the branch's last
    projection (an attention's `proj`, an MLP's `fc2`): with the projection's bias change `d`, its output `y` becomes
    `gamma (y + d)`, and merged its weight is `gamma W` and its bias `gamma (b + d)`. A LayerScale that follows is
    linear, so that this equals a factor behind it, and its own vector is left alone. gamma starts at 1; what is
    trained is `gamma - 1`, so that weight decay pulls towards the identity.

    It goes on the group of one block, so that the budget decides how many blocks get it. What the paper trains outside
    of the blocks (the class token or embedding, the last norm, the patch embedding's bias) has methods of its own:
    `tokens`, `norm` and `bias`. In a block whose branches end in a norm a factor would be normalised away, and in one
    without branches there is nothing to scale: neither is offered.
    """

    family: ClassVar[str] = "vector"

    def members(self, site: Site) -> tuple[Site, ...]:
        """What it changes in a group `block:K`; empty when no branch of the block can be scaled."""
        return tuple(member for member, _ in self.parts(site))

    def parts(self, site: Site) -> tuple[tuple[Site, tuple[Slot, ...]], ...]:
        """Biases of Linears and convolutions, weight and bias of norms; `bias` and `output` of last projections."""
        last = _last_projections(site)
        return tuple((m, slots) for m in site.members if (slots := _slots(m, m.name in last))) if last else ()

    def sizes(self, site: Site) -> tuple[int, ...]:
        """1 where it can be used."""
        return (1,) if self.parts(site) else ()

    def cost(self, site: Site, size: int) -> Cost:
        """Biases, norm affines and one scalar per branch; merged, it also changes the last projections' weights."""
        check_size("diffit", site, size, self.sizes(site))
        trained = entries = tensors = 0
        for member, slots in self.parts(site):
            own = member.n_bias * ("bias" in slots) + member.n_weight * ("weight" in slots)
            scaled = "output" in slots
            trained += own + scaled
            entries += own + member.n_weight * scaled
            tensors += len(slots)
        return Cost.plain(trained, entries=entries, tensors=tensors)

    def build(self, site: Site, option: Option, host: nn.Module, generator: torch.Generator) -> DiffFitShared:
        """The identity; nothing is random."""
        check_size("diffit", site, option.size, self.sizes(site))
        return DiffFitShared(site, self.parts(site), host)

    def gains(self, site: Site, evidence: Evidence, sizes: Sequence[int]) -> tuple[float, ...]:
        """The energy of the signals of biases and norms, and along each last projection's weight.

        Beside a free bias, a factor moves the loss along the direction of W alone: `<S, W>^2 / |W|^2`.
        """
        total = 0.0
        for member, slots in self.parts(site):
            known = member_evidence(evidence, member)
            total += sum(energy(known[slot].signal) for slot in slots if slot != "output")
            if "output" in slots:
                weight, signal = known["weight"].value.double(), known["weight"].signal.double()
                total += float((weight * signal).sum()) ** 2 / max(float(weight.square().sum()), 1e-300)
        return (total,) * len(sizes)


class DiffFitShared(Shared):
    """A block's members; nothing is shared between them but the decision."""

    def __init__(self, site: Site, parts: tuple[tuple[Site, tuple[Slot, ...]], ...], model: nn.Module) -> None:
        super().__init__(site)
        for member, slots in parts:
            host = model.get_submodule(member.module)
            self.add(BranchScale(member, host, slots) if "output" in slots else DenseAdapter(member, host, slots))


class BranchScale(Adapter):
    """`scale` = gamma - 1 (1,), and `bias` (out_features,) where the host has one, the change of it."""

    def __init__(self, site: Site, host: nn.Module, slots: tuple[Slot, ...]) -> None:
        obstacle = ""
        if not is_linear_in_weight(host):
            obstacle = f"the output of a {type(host).__name__} does not scale with its weight"
        super().__init__(site, slots, "output", obstacle)
        host_tensor(site, host, site.parameter)
        self.scale = new_parameter(host, torch.zeros(1))
        self.bias = new_parameter(host, torch.zeros(site.out_features)) if "bias" in slots else None

    def transform(self, y: Tensor) -> Tensor:
        """`gamma (y + bias)` in the parameters' precision."""
        wide = y.to(self.scale.dtype)
        if self.bias is not None:
            wide = wide + along(self.bias, y.ndim, self.site.channel_axis)
        return torch.addcmul(wide, wide, self.scale).to(y.dtype)

    def merge(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`gamma W` and `gamma (b + bias)`."""
        gamma = 1 + self.scale
        merged = {**tensors, "weight": gamma.to(tensors["weight"].dtype) * tensors["weight"]}
        if self.bias is not None:
            bias = tensors["bias"]
            merged["bias"] = gamma.to(bias.dtype) * (bias + self.bias.to(bias.dtype))
        return merged


def _last_projections(site: Site) -> frozenset[str]:
    """Names of the last Linear or convolution of every branch that a norm stands in front of."""
    if site.kind != "group" or not site.name.startswith("block:"):
        return frozenset()
    found = set()
    for branch in site.members:
        if branch.kind == "residual" and branch.entry:
            inside = [m for m in site.members if m.is_matrix and m.name.startswith(branch.name + ".")]
            if inside and "output" in inside[-1].slots:
                found.add(inside[-1].name)
    return frozenset(found)


def _slots(member: Site, last: bool) -> tuple[Slot, ...]:
    if member.kind in ("layer_norm", "batch_norm"):
        wanted: tuple[Slot, ...] = ("weight", "bias")
    elif member.is_matrix:
        wanted = ("bias", "output") if last else ("bias",)
    else:
        return ()
    return tuple(s for s in wanted if s in member.slots and (s != "bias" or member.has_bias))
