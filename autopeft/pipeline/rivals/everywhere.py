"""One method on every site that it can be put on, or on as many of the last blocks as the budget reaches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from autopeft.allocation.uniform import Uniform
from autopeft.errors import InfeasibleBudget
from autopeft.pipeline.contenders import Candidate, Group
from autopeft.pipeline.rivals._plans import brought, priced_menu, uniform_plan

if TYPE_CHECKING:
    from autopeft.config.study import Study
    from autopeft.pipeline.prepare import Prepared

__all__ = ["BestSingle", "BitFit", "NormTuning", "ScaleShift", "UniformCore"]


@dataclass(frozen=True, slots=True)
class _Everywhere:
    """One variant per method."""

    keys: ClassVar[tuple[str, ...]]
    title: ClassVar[str]

    @property
    def needs(self) -> tuple[str, ...]:
        """Its methods, when it has but one."""
        return self.keys if len(self.keys) == 1 else ()

    def group(self, prepared: Prepared, study: Study) -> Group:
        """Every method everywhere; one that this budget or model cannot express is left out."""
        found: list[Candidate] = []
        reason: InfeasibleBudget | None = None
        for key, method in brought(study, self.keys).items():
            menu = priced_menu(prepared, study, {key: method}, "whole")
            try:
                name, plan = uniform_plan(
                    prepared, study, {key: method}, menu, Uniform(key, "all"), f"{key} everywhere"
                )
            except InfeasibleBudget as error:
                reason = error
                continue
            found.append(Candidate(name, plan, {} if key in study.methods else {key: method}))
        if not found:
            raise reason or InfeasibleBudget(f"{self.title} names no method")
        return Group(self.title, "baseline", tuple(found))


@dataclass(frozen=True, slots=True)
class UniformCore(_Everywhere):
    """One core matrix of the same size on every matrix (LoRA-XS; Balazy et al., 2024, arXiv 2405.17604)."""

    title: ClassVar[str] = "uniform core"
    keys: ClassVar[tuple[str, ...]] = ("core",)


@dataclass(frozen=True, slots=True)
class BitFit(_Everywhere):
    """Every bias (Ben Zaken et al., 2022, arXiv 2106.10199)."""

    title: ClassVar[str] = "bitfit"
    keys: ClassVar[tuple[str, ...]] = ("bias",)


@dataclass(frozen=True, slots=True)
class NormTuning(_Everywhere):
    """Every norm (LN-tuning; Zhao et al., 2023, arXiv 2312.11420)."""

    title: ClassVar[str] = "norm tuning"
    keys: ClassVar[tuple[str, ...]] = ("norm",)


@dataclass(frozen=True, slots=True)
class ScaleShift(_Everywhere):
    """Scale and shift behind every operation (SSF; Lian et al., 2022, arXiv 2210.08823)."""

    title: ClassVar[str] = "ssf"
    keys: ClassVar[tuple[str, ...]] = ("ssf",)


@dataclass(frozen=True, slots=True)
class BestSingle(_Everywhere):
    """The best of the cheap methods, each alone: the study's among bias, norm and SSF, or all three."""

    title: ClassVar[str] = "single method"
    keys: ClassVar[tuple[str, ...]] = ("bias", "norm", "ssf")
