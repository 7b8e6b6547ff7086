"""VPT: prompt tokens beside those of a transformer block."""

from __future__ import annotations

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
from autopeft.methods.base import Adapter

__all__ = ["VPT", "VPTAdapter"]


@dataclass(frozen=True, slots=True)
class VPT(ChoosesNothing):
    """p trained tokens that a block sees beside its own, and that are taken out of its output.

    VPT-Deep of Jia et al., 2022, arXiv 2203.12119, one option per block. Sizes are numbers of prompts p.
    The paper puts prompts between class token and patches; here they lie behind all tokens, which makes no difference
    where a block may have them at all: those that know where their tokens lie (a relative position bias, rotary angles,
    windows) do not run on more of them, and have no slot `tokens`. It cannot be merged.

    It does not start at the pre-trained model: prompts take part in attention from the first step.

    Attributes:
        dropout: share of the prompts' values that training drops.
    """

    dropout: float = 0.0

    family: ClassVar[str] = "tokens"

    def __post_init__(self) -> None:
        check_dropout("vpt", self.dropout)

    def slots(self, site: Site) -> tuple[Slot, ...]:
        """`tokens` of a block that takes further tokens."""
        return ("tokens",) if self.sizes(site) else ()

    def sizes(self, site: Site) -> tuple[int, ...]:
        """1, 2, 5, 10, 20, 50, 100, 200."""
        return SIZES if site.kind == "block" and "tokens" in site.slots else ()

    def cost(self, site: Site, size: int) -> Cost:
        """`p C`; added parameters count as entries, since no tensor of the model can hold them."""
        n = check_size("vpt", site, size, self.sizes(site)) * site.out_features
        return Cost.plain(n, entries=n)

    def mergeable(self, site: Site) -> bool:
        """No: prompts are further tokens."""
        return False

    def build(self, site: Site, option: Option, host: nn.Module, generator: torch.Generator) -> VPTAdapter:
        """Prompts drawn uniformly."""
        count = check_size("vpt", site, option.size, self.sizes(site))
        return VPTAdapter(site, host, count, self.dropout, generator)

    def gains(self, site: Site, evidence: Evidence, sizes: Sequence[int]) -> tuple[float, ...]:
        """A proxy: `min(p / C, 1)` of the energy of the block's `sum over tokens of dL/dy y^T`; 0 without it.

        That is what p C numbers blind to the data are expected to hold of a C x C matrix. What prompts do goes through
        attention, and no evidence at the block's output describes it.
        """
        return prompt_gains(site, evidence, tuple(sizes))


class VPTAdapter(Adapter):
    """`prompts` (p, C)."""

    def __init__(self, site: Site, host: nn.Module, count: int, dropout: float, generator: torch.Generator) -> None:
        super().__init__(site, ("tokens",), "wrap", OBSTACLE)
        self.prompts = new_parameter(host, drawn_prompts(count, site.out_features, generator))
        self.dropout = dropout

    def around(self, run: Callable[..., Any], *args: Any) -> Tensor:
        """The block on its tokens and the prompts; the prompts' own outputs are dropped."""
        count = len(self.prompts)
        longer = with_prompts(tokens_of(self.site, args), self.prompts, self.dropout, self.training)
        with extra_tokens(count):
            y = run(longer, *args[1:])
        return without_prompts(self.site, y, longer.shape[1], count)
