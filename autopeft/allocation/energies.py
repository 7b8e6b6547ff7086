"""What every option captures of the scorer's signal, before any correction."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from autopeft.allocation._cross import cross_valued
from autopeft.allocation._roles import role_group
from autopeft.allocation.memory import memory_changes
from autopeft.core.menu import Option
from autopeft.core.places import places_of
from autopeft.errors import UsageError

if TYPE_CHECKING:
    from autopeft.core.budget import Budget
    from autopeft.core.contracts import Method
    from autopeft.core.scores import Evidence, ScoreOrigin, Scores
    from autopeft.core.site import Catalog, Fused, Site

__all__ = ["Energies", "energies"]


@dataclass(frozen=True, slots=True, eq=False)
class Energies:
    """Every option within a budget, before any correction; computed once and used for hundreds of trials.

    Attributes:
        options: in canonical order; `gain` is the energy that the method expects to capture, in the scorer's unit.
        total: sum over the sites of the largest energy of an option there; 1 when nothing has any energy.
        values: `gain` of the options as a share of `total`, float64 of shape (n,).
        memories: `memory` of the options, what their steps do to memorisation (`memory_changes`), as a share of
            `memory_total`, float64 of shape (n,); None where the scorer measured nothing of it.
        memory_total: sum over the sites of the largest change, in either direction, of an option there; 1 when nothing
            changes it.
        depths: depth of the options' sites in [-1, 1], float64 of shape (n,).
        groups: role group of the options' sites.
        sites: the candidate sites, by name.
        scores: the scores that the energies come from.
    """

    options: tuple[Option, ...]
    total: float
    values: Any
    depths: Any
    groups: tuple[str, ...]
    sites: Mapping[str, Site]
    scores: Scores | None
    memories: Any | None = None
    memory_total: float = 1.0


def energies(
    catalog: Catalog,
    methods: Mapping[str, Method],
    scores: Scores,
    *,
    fused: Fused = "whole",
    budget: Budget,
    mergeable: bool = False,
    tangent: Collection[str] = (),
) -> Energies:
    """Every size of every method at every site that the budget could pay for alone, with its uncorrected gain.

    Sites where a method has no slots, and sites that the scorer kept no evidence for, are not offered. Where the scorer
    kept halves, the entries that a method of that family would choose on the first are valued on the second: valued on
    the samples they were chosen by, they would look better than they are.

    Args:
        catalog: the model's sites.
        methods: method key to method.
        scores: what the gains are computed from.
        fused: whether fused projections are offered whole, as slices, or both.
        budget: sizes that cost more than its limit are left out.
        mergeable: whether to leave out what cannot be merged into the model's own tensors.
        tangent: keys of methods that are valued by `tangent_gains`.

    Raises:
        UsageError: when a method predicts a gain that is not finite.
    """
    sites = {site.name: site for site in catalog.offered(fused)}
    known = {name: evidence for name, site in sites.items() if (evidence := scores.about(site)) is not None}
    options = [
        option
        for name, evidence in known.items()
        for key, method in methods.items()
        if not mergeable or method.mergeable(sites[name])
        for option in _options(catalog, sites[name], key, method, evidence, scores.origin, budget, key in tangent)
    ]
    options.sort(key=lambda o: o.order)
    total = _total((o.site, o.gain) for o in options)
    changes = [o.memory for o in options if o.memory is not None]
    memory_total = _total((o.site, abs(o.memory)) for o in options if o.memory is not None)
    last = max(catalog.n_depth - 1, 1)
    middle = catalog.n_depth == 1
    return Energies(
        options=tuple(options),
        total=total,
        values=np.array([o.gain for o in options], dtype=np.float64) / total,
        depths=np.array([0.0 if middle else 2 * sites[o.site].depth / last - 1 for o in options], dtype=np.float64),
        groups=tuple(role_group(sites[o.site]) for o in options),
        sites=sites,
        scores=scores,
        memories=np.array(changes, dtype=np.float64) / memory_total if scores.origin.memory else None,
        memory_total=memory_total,
    )


def _total(values: Iterable[tuple[str, float]]) -> float:
    best: dict[str, float] = {}
    for site, value in values:
        best[site] = max(best.get(site, 0.0), value)
    return math.fsum(best.values()) or 1.0


def _options(
    catalog: Catalog,
    site: Site,
    key: str,
    method: Method,
    evidence: Evidence,
    origin: ScoreOrigin,
    budget: Budget,
    tangent: bool,
) -> list[Option]:
    places = places_of(catalog, method, site)
    if not places:
        return []
    priced = [(size, method.cost(site, size)) for size in method.sizes(site)]
    priced = [(size, cost) for size, cost in priced if cost.of(budget.unit) <= budget.limit]
    if not priced:
        return []
    sizes = [size for size, _ in priced]
    valued = cross_valued(evidence) if method.family == "entries" else evidence
    changes: Sequence[float | None] | None = [None] * len(sizes)
    try:
        own = _tangent(method, site, valued, sizes) if tangent else None
        gains = own or method.gains(site, valued, sizes)
        if origin.memory:

            def captured(seen: Evidence) -> tuple[float, ...]:
                return (_tangent(method, site, seen, sizes) if own else None) or method.gains(site, seen, sizes)

            # For a gap each half makes a choice and a step of its own.
            seen = evidence if origin.memory == "gap" else valued
            changes = memory_changes(captured, seen, origin.memory, fixed=own is not None)
    except UsageError:
        # The scorer kept nothing for a slot that this method changes: it cannot be compared, so it is not offered.
        return []
    if changes is None:
        return []
    for size, gain, change in zip(sizes, gains, changes, strict=True):
        if not math.isfinite(gain) or not math.isfinite(change or 0.0):
            what = f"a gain of {gain}" + ("" if change is None else f" and a change of memorisation of {change}")
            raise UsageError(
                f"method {key!r} of size {size} predicts {what} at {site.name}; the scores of {origin.scorer} there "
                "are not usable"
            )
    return [
        Option(site.name, key, size, cost, float(gain), places, memory=change)
        for (size, cost), gain, change in zip(priced, gains, changes, strict=True)
    ]


def _tangent(method: Method, site: Site, evidence: Evidence, sizes: list[int]) -> tuple[float, ...] | None:
    # Imports torch, and whoever reads a study imports this module.
    from autopeft.allocation.tangent import tangent_gains

    return tangent_gains(method, site, evidence, sizes)
