"""How good a plan is known to be, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["packing_lines"]

_LISTED = 3
"""Exchanged options that are named."""


def packing_lines(facts: Mapping[str, Any], limit: int) -> tuple[str, ...]:
    """Lines on the proof, what more budget would buy, memorisation and the next best plan; fewer where less is known.

    Args:
        facts: `packing` of a `plan.json`.
        limit: the plan's budget, in its own unit.
    """
    lines = []
    bound, gap, price = facts.get("bound"), facts.get("gap"), facts.get("price")
    value = facts.get("gain") if facts.get("value") is None else facts["value"]
    if bound is not None and bound > 0 and value is not None and gap is not None:
        proof = "proven optimal" if gap < 1e-12 else f"within {gap:.1e} of the optimum, proven"
        if price is not None and value > 0:
            proof += f"; 1 % more budget would add about {price * 0.01 * limit / value:.2%} of predicted gain"
        lines.append(proof)
        worth = f", {price:.3g} per further unit of budget" if price is not None else ""
        lines.append(f"predicted gain {value:.6g}, upper bound {bound:.6g}{worth}; {facts.get('unspent', 0):,} unspent")
    if facts.get("memory") is not None:
        way = "more" if facts["memory"] > 0 else "less"
        lines.append(f"predicted change of memorisation {facts['memory']:+.6g} ({way}), its price taken off the gain")
    if rival := facts.get("next_best"):
        lines.append(_rival(rival))
    return tuple(lines)


def _rival(rival: Mapping[str, Any]) -> str:
    loss = rival["loss"]
    how = "gains as much" if abs(loss) < 1e-12 else f"gains {loss:.2g} of this less"
    less, more = (_listed(rival[key]) for key in ("removed", "added"))
    exchange = f"{more or 'nothing'} in place of {less}" if less else f"{more} as well"
    proven = "" if rival.get("proven", True) else " (the search for it was cut short)"
    return f"the next best plan {how}: {exchange}{proven}"


def _listed(options: list[Mapping[str, Any]]) -> str:
    named = [f"{o['method']} {o['size']:,} at {o['site']}" for o in options[:_LISTED]]
    left = len(options) - len(named)
    return ", ".join([*named, *([f"{left} more"] if left else [])])
