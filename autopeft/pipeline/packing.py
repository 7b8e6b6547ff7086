"""What is known of how well a plan is packed: proof, price, what is left over, and the next best plan."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from autopeft.allocation.knapsack import Knapsack
from autopeft.config.decode import study_from_dict
from autopeft.core.allocation import Allocation
from autopeft.core.menu import Menu, Option
from autopeft.errors import InfeasibleBudget, UsageError
from autopeft.pipeline.plan import make_menu
from autopeft.pipeline.targets import limited_menus

if TYPE_CHECKING:
    from autopeft.config.study import Study
    from autopeft.pipeline.planfile import Plan
    from autopeft.pipeline.prepare import Prepared

__all__ = ["next_best", "packing_facts", "packing_of"]


def packing_facts(plan: Allocation, rival: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Plain data for `plan.json`.

    Args:
        plan: the plan.
        rival: what `next_best` found, None when it was not asked or there is none.

    Returns:
        `gain`, `value` (what was maximised where that is something else), `bound` (no plan is worth more), `gap`
        (relative distance to it), `price` (gain per further unit of budget), `unspent` (units of budget) and
        `next_best`; where memorisation has a price, `memory` too: its predicted change, in the unit of the gains.
    """
    proof = plan.provenance
    return {
        "gain": plan.gain,
        "value": proof.value,
        "bound": proof.bound,
        "gap": plan.gap,
        "price": proof.price,
        "unspent": plan.budget.limit - plan.spent,
        "next_best": rival,
        **({} if plan.memory is None else {"memory": plan.memory}),
    }


def next_best(prepared: Prepared, study: Study, plan: Allocation) -> dict[str, Any] | None:
    """The best plan within the study's constraints that is not this one, as plain data.

    Returns:
        `gain`, `spent`, `loss` (of predicted gain, relative to the plan's), `removed` and `added` (options that the two
        plans do not share) and `proven`; None when there is no other plan, when the allocator ranks none, or when the
        plan is not what it made.
    """
    allocator = study.allocator
    if not isinstance(allocator, Knapsack) or not len(plan):
        return None
    rivals, bound = _rivals(allocator, limited_menus(prepared, study, make_menu(prepared, study)), prepared, plan)
    if not rivals:
        return None
    rival = max(rivals, key=lambda p: p.worth)
    mine, its = {o.ident for o in plan}, {o.ident for o in rival}
    reached, other = plan.worth, rival.worth
    return {
        "gain": rival.gain,
        "spent": rival.spent,
        "loss": (reached - other) / abs(reached) if reached else 0.0,
        "removed": _rows(o for o in plan if o.ident not in its),
        "added": _rows(o for o in rival if o.ident not in mine),
        "proven": bound - other <= 1e-9 * abs(bound),
    }


def _rivals(
    allocator: Knapsack, menus: Sequence[Menu], prepared: Prepared, plan: Allocation
) -> tuple[list[Allocation], float]:
    """The next best plan of every menu that has the plan, the best one of every other, and what bounds them all."""
    found = []
    for menu in menus:
        try:
            rival = allocator.next_best(menu, prepared.budget, plan)
        except UsageError:
            # Not a plan of this kind of folder: the best one of this kind is its rival, if there is one.
            try:
                rival = allocator.allocate(menu, prepared.budget) if len(menus) > 1 else None
            except InfeasibleBudget:
                rival = None
        if rival is not None:
            found.append(rival)
    bounds = [r.provenance.bound for r in found if r.provenance.bound is not None]
    return found, max(bounds, default=math.inf)


def packing_of(prepared: Prepared, plan: Plan) -> dict[str, Any]:
    """`packing_facts` of a plan that was read back, with the next best plan within its own study."""
    return packing_facts(plan.allocation, next_best(prepared, study_from_dict(plan.study), plan.allocation))


def _rows(options: Iterable[Option]) -> list[dict[str, Any]]:
    return [
        {"site": o.site, "method": o.method, "size": o.size, "cost": o.cost.trainable, "gain": o.gain} for o in options
    ]
