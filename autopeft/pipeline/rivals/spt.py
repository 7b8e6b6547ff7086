"""SPT at the strict budget."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from autopeft.allocation.spt import SPT
from autopeft.core.menu import Menu
from autopeft.pipeline.contenders import Candidate, Group, spt_scores
from autopeft.pipeline.rivals._plans import brought, variants

if TYPE_CHECKING:
    from autopeft.config.study import Study
    from autopeft.pipeline.prepare import Prepared

__all__ = ["SPTAdapter", "SPTLoRA"]

_RANKS = (8, 1)
"""As released, and the only rank whose modules a budget of 0.1 % can buy on small models."""

_BESIDES = ("sparse", "bias", "vector", "tokens")
"""What it buys where it buys no module. `sparse_bias` comes from the study alone, as it is a setting of `sparse`."""


@dataclass(frozen=True, slots=True)
class _Strict:
    """He et al., 2023, arXiv 2303.08566, ranked by squared gradients, with the largest total within the budget."""

    structured: ClassVar[str]
    title: ClassVar[str]

    @property
    def needs(self) -> tuple[str, ...]:
        """The structured module."""
        return (self.structured,)

    def group(self, prepared: Prepared, study: Study) -> Group:
        """One variant per size of the structured module."""
        lacking = {k: m for k, m in brought(study, (self.structured, *_BESIDES)).items() if k not in study.methods}
        methods = {**study.methods, **(lacking if self.structured in lacking else {})}
        sites = {site.name: site for site in prepared.catalog.candidates("slices")}
        menu = Menu((), sites, spt_scores(prepared.scores))
        plans = variants(
            (
                f"{self.title} (r{rank})",
                partial(
                    SPT(structured=self.structured, methods=methods, rank=rank).allocate,
                    menu,
                    prepared.budget,
                    study.seed,
                ),
            )
            for rank in _RANKS
        )
        own = {key: method for key, method in methods.items() if key not in study.methods}
        return Group(self.title, "baseline", tuple(Candidate(name, plan, own) for name, plan in plans))


@dataclass(frozen=True, slots=True)
class SPTLoRA(_Strict):
    """SPT with LoRA as its structured module."""

    title: ClassVar[str] = "spt-lora"
    structured: ClassVar[str] = "lora"


@dataclass(frozen=True, slots=True)
class SPTAdapter(_Strict):
    """SPT with a bottleneck adapter as its structured module."""

    title: ClassVar[str] = "spt-adapter"
    structured: ClassVar[str] = "adapter"
