"""VPT-Shallow: prompt tokens that travel through all blocks of a transformer."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from autopeft.core.budget import Cost
from autopeft.core.menu import Option
from autopeft.core.scores import Evidence
from autopeft.core.site import Site, Slot
from autopeft.methods._host import new_parameter
from autopeft.methods._parallel import check_dropout
from autopeft.methods._patches import extra_tokens
from autopeft.methods._prompts import (
    OBSTACLE,
    SIZES,
    drawn_prompts,
    prompt_gains,
    tokens_of,
    with_prompts,
    without_prompts,
)
from autopeft.methods._sizes import check_size
from autopeft.methods._traits import ChoosesNothing
from autopeft.methods.base import Adapter, Shared

__all__ = ["VPTShallow", "VPTShallowAdapter", "VPTShallowPrompts"]

_NUMBERED = re.compile(r"^(.*?)(\d+)$")


@dataclass(frozen=True, slots=True)
class VPTShallow(ChoosesNothing):
    """p trained tokens put behind those of the first block, and taken out behind the last one.

    VPT-Shallow of Jia et al., 2022, arXiv 2203.12119. Sizes are numbers of prompts p. It acts on the group
    `blocks`: the blocks in between hand the prompts on, so that none of them can have prompts of its own, and an
    adapter that looks for patches is told in every block which tokens are prompts. The head never sees them. It cannot
    be merged.

    Blocks that take further tokens must follow each other in one list and be of one width; blocks of a convolutional
    stem in front of them do not matter.

    It does not start at the pre-trained model: prompts take part in attention from the first step.

    Attributes:
        dropout: share of the prompts' values that training drops, where they come in.
    """

    dropout: float = 0.0

    family: ClassVar[str] = "tokens"

    def __post_init__(self) -> None:
        check_dropout("vpt_shallow", self.dropout)

    def parts(self, site: Site) -> tuple[tuple[Site, tuple[Slot, ...]], ...]:
        """The slot `tokens` of every block of the group `blocks` that has it; nothing on other groups."""
        if site.kind != "group" or site.name != "blocks":
            return ()
        members = tuple(m for m in site.members if "tokens" in m.slots)
        return tuple((m, ("tokens",)) for m in members) if _is_one_stream(members) else ()

    def slots(self, site: Site) -> tuple[Slot, ...]:
        """`tokens` on the group `blocks` of a transformer."""
        return ("tokens",) if self.parts(site) else ()

    def sizes(self, site: Site) -> tuple[int, ...]:
        """1, 2, 5, 10, 20, 50, 100, 200."""
        return SIZES if self.parts(site) else ()

    def cost(self, site: Site, size: int) -> Cost:
        """`p C`, once; added parameters count as entries, since no tensor of the model can hold them."""
        count = check_size("vpt_shallow", site, size, self.sizes(site))
        n = count * self.parts(site)[0][0].out_features
        return Cost.plain(n, entries=n)

    def mergeable(self, site: Site) -> bool:
        """No: prompts are further tokens."""
        return False

    def build(self, site: Site, option: Option, host: nn.Module, generator: torch.Generator) -> VPTShallowPrompts:
        """Prompts drawn uniformly."""
        count = check_size("vpt_shallow", site, option.size, self.sizes(site))
        members = [member for member, _ in self.parts(site)]
        return VPTShallowPrompts(site, members, host, count, self.dropout, generator)

    def gains(self, site: Site, evidence: Evidence, sizes: Sequence[int]) -> tuple[float, ...]:
        """A proxy: `min(p / C, 1)` of the energy of the first block's `sum over tokens of dL/dy y^T`; 0 without it.

        As for prompts of one block; what those that travel on do in later blocks is not counted.
        """
        first = self.parts(site)[0][0]
        return prompt_gains(first, evidence.members.get(first.name), tuple(sizes))


class VPTShallowPrompts(Shared):
    """`prompts` (p, C), and one adapter per block."""

    def __init__(
        self,
        site: Site,
        members: Sequence[Site],
        host: nn.Module,
        count: int,
        dropout: float,
        generator: torch.Generator,
    ) -> None:
        super().__init__(site)
        self.prompts = new_parameter(host, drawn_prompts(count, members[0].out_features, generator))
        self.dropout = dropout
        for i, member in enumerate(members):
            self.add(VPTShallowAdapter(member, self, enters=i == 0, leaves=i == len(members) - 1))


class VPTShallowAdapter(Adapter):
    """Lets the prompts in, hands them on, or takes them out."""

    def __init__(self, site: Site, shared: VPTShallowPrompts, *, enters: bool, leaves: bool) -> None:
        super().__init__(site, ("tokens",), "wrap", OBSTACLE)
        self._shared = (shared,)
        self.enters = enters
        self.leaves = leaves

    def around(self, run: Callable[..., Any], *args: Any) -> Tensor:
        """The block on its tokens and the prompts."""
        (shared,) = self._shared
        x, count = tokens_of(self.site, args), len(shared.prompts)
        if self.enters:
            x = with_prompts(x, shared.prompts, shared.dropout, shared.training)
        with extra_tokens(count):
            y = run(x, *args[1:])
        own = without_prompts(self.site, y, x.shape[1], count)
        if self.leaves:
            return own
        whole: Tensor = y
        return whole


def _is_one_stream(members: Sequence[Site]) -> bool:
    """Whether blocks of one width are numbered in a row in one list."""
    found = [_NUMBERED.match(m.name) for m in members]
    if len(found) < 2 or not all(found) or len({m.shape for m in members}) > 1:
        return False
    names = [match.groups() for match in found if match is not None]
    first = int(names[0][1])
    return all(name == (names[0][0], str(first + i)) for i, name in enumerate(names))
