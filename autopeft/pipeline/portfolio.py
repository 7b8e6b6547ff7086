"""The candidates of a race: what is known to work at small budgets, and our own plans."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from autopeft.allocation.knapsack import Knapsack
from autopeft.core.allocation import Allocation
from autopeft.errors import InfeasibleBudget
from autopeft.pipeline.contenders import Group
from autopeft.pipeline.plan import make_menu, make_plan
from autopeft.pipeline.targets import is_constrained, limited_menus

if TYPE_CHECKING:
    from autopeft.config.study import Study
    from autopeft.pipeline.prepare import Prepared

__all__ = ["Arm", "portfolio"]

_GROUPS = ("uniform core", "uniform lora", "spt-lora", "random mix")
_PACKED = {"packed core": ("core",), "packed bias and norm": ("bias", "norm")}
_TILT = 2.0
_SLOWER = 10**-0.5


@dataclass(frozen=True)
class Arm:
    """One candidate.

    Attributes:
        name: what a person calls it.
        allocation: its plan.
        study: the settings it is trained under.
        lr_scale: factor on the learning rates, relative to the study's.
    """

    name: str
    allocation: Allocation
    study: Study
    lr_scale: float = 1.0


def portfolio(prepared: Prepared, study: Study, groups: Sequence[Group]) -> tuple[Arm, ...]:
    """The default mix first; then one core everywhere, cores packed by gain, biases and norms, LoRA on q and v, LoRA in
    the last blocks, SPT, one random mix, and the default mix at a third of the learning rate.

    What this budget or these methods cannot express is left out, and so is a plan that is there already, or that does
    not keep the side constraints: the winner of a race is exported.
    """  # noqa: D205 - one sentence
    arms: list[Arm] = []
    held = study.allocator if isinstance(study.allocator, Knapsack) and is_constrained(study) else None
    menus = limited_menus(prepared, study, make_menu(prepared, study)) if held is not None else ()
    for arm in _all(prepared, study, groups):
        if held is not None and not any(held.keeps(menu, arm.allocation) for menu in menus):
            continue
        if not any(a.allocation.digest == arm.allocation.digest and a.lr_scale == arm.lr_scale for a in arms):
            arms.append(arm)
    return tuple(arms)


def _all(prepared: Prepared, study: Study, groups: Sequence[Group]) -> Iterable[Arm]:
    known = {group.name: group.candidates for group in groups}
    default = next(group.candidates[0] for group in groups if group.role == "default")
    yield Arm("default mix", default.allocation, study)
    for name, keys in _PACKED.items():
        methods = {key: study.methods[key] for key in keys if key in study.methods}
        if methods:
            yield from _packed(prepared, dataclasses.replace(study, methods=methods), study, name)
    if "lora" in study.methods:
        gain = dataclasses.replace(study.gain, depth_tilt=_TILT)
        late = dataclasses.replace(study, methods={"lora": study.methods["lora"]}, gain=gain)
        yield from _packed(prepared, late, study, "lora in the last blocks")
    for name in _GROUPS:
        for candidate in known.get(name, ())[:1]:
            yield Arm(candidate.name, candidate.allocation, candidate.under(study))
    train = dataclasses.replace(study.train, lr_scale=study.train.lr_scale * _SLOWER)
    slower = dataclasses.replace(study, train=train)
    yield Arm("default mix, slower", default.allocation, slower, _SLOWER)


def _packed(prepared: Prepared, planned: Study, trained: Study, name: str) -> Iterable[Arm]:
    try:
        allocation = make_plan(prepared, planned)
    except InfeasibleBudget:
        return
    if len(allocation):
        yield Arm(name, allocation, trained)
