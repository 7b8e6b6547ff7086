"""One low-rank method at one rank on the usual target sets, of which the best is kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar, get_args

from autopeft.allocation.uniform import Target, Uniform
from autopeft.backends.hf_peft import HfPeftBackend
from autopeft.core.allocation import Allocation
from autopeft.errors import InfeasibleBudget
from autopeft.pipeline.contenders import Candidate, Group
from autopeft.pipeline.rivals._plans import brought, priced_menu, uniform_plan

if TYPE_CHECKING:
    from autopeft.config.study import Study
    from autopeft.pipeline.prepare import Prepared

__all__ = ["UniformDoRA", "UniformEVA", "UniformLoRA", "UniformSNELL"]

_TARGETS: tuple[Target, ...] = get_args(Target)


@dataclass(frozen=True, slots=True)
class _Uniform:
    """The largest common rank on query and value, on all three, on attention, on the MLP, on everything.

    Where rank 1 on every block does not fit, on as many of the last blocks as do.
    """

    key: ClassVar[str]
    title: ClassVar[str]
    peft: ClassVar[bool] = False

    @property
    def needs(self) -> tuple[str, ...]:
        """Its method."""
        return (self.key,)

    def group(self, prepared: Prepared, study: Study) -> Group:
        """One variant per target set that the budget can express."""
        methods = brought(study, [self.key])
        whole = priced_menu(prepared, study, methods, "whole")
        slices = priced_menu(prepared, study, methods, "slices")
        found: list[Candidate] = []
        reason = InfeasibleBudget(f"{self.title} fits no target set")
        for target in _TARGETS:
            menu = slices if target == "qv" else whole
            make: Callable[[], tuple[str, Allocation]] = partial(
                uniform_plan, prepared, study, methods, menu, Uniform(self.key, target), f"{self.title} ({target})"
            )
            try:
                name, plan = make()
            except InfeasibleBudget as error:
                reason = error
                continue
            own = {} if self.key in study.methods else methods
            found.append(Candidate(name, plan, own, HfPeftBackend() if self.peft else None))
        if not found:
            raise reason
        return Group(self.title, "baseline", tuple(found))


@dataclass(frozen=True, slots=True)
class UniformLoRA(_Uniform):
    """LoRA (Hu et al., 2021, arXiv 2106.09685)."""

    title: ClassVar[str] = "uniform lora"
    key: ClassVar[str] = "lora"


@dataclass(frozen=True, slots=True)
class UniformDoRA(_Uniform):
    """DoRA (Liu et al., 2024, arXiv 2402.09353)."""

    title: ClassVar[str] = "dora"
    key: ClassVar[str] = "dora"


@dataclass(frozen=True, slots=True)
class UniformSNELL(_Uniform):
    """SNELL (Shen et al., 2024, arXiv 2411.01800); from about 0.4 % of a ViT-B on, less on part of its sites."""

    title: ClassVar[str] = "snell"
    key: ClassVar[str] = "snell"


@dataclass(frozen=True, slots=True)
class UniformEVA(_Uniform):
    """EVA (Paischer et al., 2024, arXiv 2410.07170) through PEFT: LoRA that starts from the activations' directions.

    Ranks are uniform (rho = 1): its own redistribution keeps the sum of ranks and not the number of parameters.
    """

    title: ClassVar[str] = "eva"
    key: ClassVar[str] = "eva"
    peft: ClassVar[bool] = True
