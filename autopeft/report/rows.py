"""A plan as rows: what was bought where, for tables and pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from autopeft.core.allocation import Allocation
from autopeft.core.menu import Option
from autopeft.core.site import Site
from autopeft.errors import UsageError

__all__ = ["AllocationRow", "allocation_rows", "spending"]

_KEYS = ("site", "slot", "method", "size", "cost", "gain")


@dataclass(frozen=True, slots=True)
class AllocationRow:
    """One bought option.

    Attributes:
        site: name of the site.
        slot: what of the site it changes; several joined by `+`.
        method: key of the method.
        size: the method's own size: rank, core side, entries, width.
        cost: trainable scalars.
        gain: predicted gain.
        role: what the site does, such as `attn.qkv`; the end of the site's name when the site is not known.
        depth: index of the residual block, None when the site is not known.
        memory: predicted change of memorisation; None where it has no price.
    """

    site: str
    slot: str
    method: str
    size: int
    cost: int
    gain: float
    role: str
    depth: int | None
    memory: float | None = None


def allocation_rows(
    allocation: Allocation | Iterable[Mapping[str, Any] | AllocationRow],
    sites: Iterable[Site] | Mapping[str, Site] = (),
) -> tuple[AllocationRow, ...]:
    """The rows of a plan, in the order of the sites where they are known, else in the plan's own.

    Args:
        allocation: an allocation, or the options of a `plan.json`: objects with `site`, `slot`, `method`, `size`,
            `cost`, `gain` and perhaps `memory`. Rows made before stay as they are.
        sites: the catalogue (or its sites), which gives every row its role and depth.

    Raises:
        UsageError: when an option lacks one of its keys.
    """
    listed = sites.values() if isinstance(sites, Mapping) else sites
    known = {site.name: (index, site) for index, site in enumerate(listed)}
    rows = [o if isinstance(o, AllocationRow) else _row(_plain(o), known) for o in allocation]
    if known:
        rows.sort(key=lambda row: known[row.site][0] if row.site in known else len(known))
    return tuple(rows)


def spending(rows: Iterable[AllocationRow], by: Callable[[AllocationRow], str]) -> dict[str, int]:
    """Trainable scalars per group, the largest first; ties in alphabetical order.

    Args:
        rows: the plan.
        by: the group of a row, such as `lambda row: row.method`.
    """
    totals: dict[str, int] = {}
    for row in rows:
        totals[by(row)] = totals.get(by(row), 0) + row.cost
    return dict(sorted(totals.items(), key=lambda item: (-item[1], item[0])))


def _plain(option: Option | Mapping[str, Any]) -> Mapping[str, Any]:
    if isinstance(option, Mapping):
        return option
    return {
        "site": option.site,
        "slot": "+".join(dict.fromkeys(place.slot for place in option.places)),
        "method": option.method,
        "size": option.size,
        "cost": option.cost.trainable,
        "gain": option.gain,
        "memory": option.memory,
    }


def _row(option: Mapping[str, Any], known: Mapping[str, tuple[int, Site]]) -> AllocationRow:
    missing = [key for key in _KEYS if key not in option]
    if missing:
        raise UsageError(f"an option of the plan lacks {', '.join(missing)}; it has {', '.join(map(str, option))}")
    name = str(option["site"])
    site = known[name][1] if name in known else None
    return AllocationRow(
        site=name,
        slot=str(option["slot"]),
        method=str(option["method"]),
        size=int(option["size"]),
        cost=int(option["cost"]),
        gain=float(option["gain"]),
        role=site.role if site else _role_from_name(name),
        depth=site.depth if site else None,
        memory=None if option.get("memory") is None else float(option["memory"]),
    )


def _role_from_name(name: str) -> str:
    words = [word for word in name.split(".") if not word.isdigit()]
    return ".".join(words[-2:])
