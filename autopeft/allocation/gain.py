"""From scores to a menu: every option of every site with its price and its corrected gain."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from autopeft.allocation._cross import cross_valued
from autopeft.allocation._roles import ROLE_GROUPS, role_group
from autopeft.allocation.hull import on_hull
from autopeft.core.menu import Menu, Option
from autopeft.core.places import places_of
from autopeft.errors import UsageError

if TYPE_CHECKING:
    from autopeft.core.budget import Budget
    from autopeft.core.contracts import Method
    from autopeft.core.scores import Evidence, Scores
    from autopeft.core.site import Catalog, Fused, Site

__all__ = ["CALIBRATION", "Energies", "GainPolicy", "build_menu", "energies"]

CALIBRATION: Mapping[str, float] = MappingProxyType(
    {"core": 1.0, "matrix": 0.125, "entries": 0.125, "vector": 0.125, "adapter": 0.125, "tokens": 0.125}
)
"""What a captured share of energy is worth per family of methods, relative to `core`.

The scorer's energy says how much loss a family could take away to first order, not how much of it training turns into
accuracy. `studies/method_priors` measures the families one at a time at one budget: core matrices gain, the others
hardly do, and a menu without this correction buys what does not.
"""


@dataclass(frozen=True, slots=True)
class GainPolicy:
    """The corrections that an outer loop makes to the scorer's gains.

    With `e` the energy of an option as a share of the model's, `m` its method of family `f`, `g` the group of its site
    and `z` in [-1, 1] the depth of its site, the gain is

        calibration[f] * methods[m] * roles[g] * exp(depth_tilt * z + depth_curvature * (z^2 - 1/3)) * e^exponent.

    The curvature term has mean zero over depth, so that it moves budget between the ends and the middle without
    changing its value against anything else.

    Attributes:
        exponent: in (0, 1]; below 1 gains saturate, so that the budget spreads.
        methods: multiplier per method key, 1 where none is given; 0 takes the method off the menu.
        roles: multiplier per group: `qkv`, `proj`, `mlp`, `norm`, `conv`, `other`; 1 where none is given.
        depth_tilt: positive values favour the last blocks.
        depth_curvature: positive values favour both ends over the middle.
        calibration: multiplier per family of methods, 1 where none is given; measured, and no knob of the search.
        tangent: keys of methods whose energies come from their own parametrisation (`tangent_gains`) in place of their
            formula, where they can; slower.
        hull: whether to offer the options on the concave hull of each place's gains alone (`on_hull`).

    Raises:
        UsageError: for a value outside of its range, or an unknown group.
    """

    exponent: float = 0.5
    methods: Mapping[str, float] = field(default_factory=dict, hash=False)
    roles: Mapping[str, float] = field(default_factory=dict, hash=False)
    depth_tilt: float = 0.0
    depth_curvature: float = 0.0
    calibration: Mapping[str, float] = field(default_factory=lambda: dict(CALIBRATION))
    tangent: tuple[str, ...] = ()
    hull: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.exponent <= 1:
            raise UsageError(f"gain.exponent must be above 0 and at most 1, got {self.exponent}")
        for name in ("depth_tilt", "depth_curvature"):
            value = getattr(self, name)
            if not abs(value) <= 20:
                raise UsageError(f"gain.{name} must lie between -20 and 20, got {value}")
        for noun in ("methods", "roles", "calibration"):
            for key, value in getattr(self, noun).items():
                if not (math.isfinite(value) and value >= 0):
                    raise UsageError(f"gain.{noun}.{key} must be a finite multiplier of at least 0, got {value}")
        for key in self.roles:
            if key not in ROLE_GROUPS:
                raise UsageError(f"gain.roles has no group {key!r}; the groups are {', '.join(ROLE_GROUPS)}")

    def correct(self, energy: float, method: str, group: str, z: float, family: str = "") -> float:
        """The gain of one option; `build_menu` does the same for all at once.

        Args:
            energy: share of the model's energy that the option captures; a negative one gives a negative gain.
            method: method key.
            group: role group of the site.
            z: depth of the site, in [-1, 1].
            family: family of the method.
        """
        factor = self.calibration.get(family, 1.0) * self.methods.get(method, 1.0) * self.roles.get(group, 1.0)
        bend = math.exp(self.depth_tilt * z + self.depth_curvature * (z * z - 1 / 3))
        return factor * bend * math.copysign(abs(energy) ** self.exponent, energy)


@dataclass(frozen=True, slots=True, eq=False)
class Energies:
    """Every option within a budget, before any correction; computed once and used for hundreds of trials.

    Attributes:
        options: in canonical order; `gain` is the energy that the method expects to capture, in the scorer's unit.
        total: sum over the sites of the largest energy of an option there; 1 when nothing has any energy.
        values: `gain` of the options as a share of `total`, float64 of shape (n,).
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
    return _measure(catalog, methods, scores, fused, budget, mergeable, tangent)


def build_menu(
    catalog: Catalog,
    methods: Mapping[str, Method],
    scores: Scores,
    policy: GainPolicy,
    *,
    fused: Fused = "whole",
    budget: Budget,
    energies: Energies | None = None,
) -> Menu:
    """The menu that a solver chooses from.

    Args:
        catalog: the model's sites.
        methods: method key to method.
        scores: what the gains are computed from.
        policy: corrections of the gains. Multipliers of methods that are not in the study are ignored.
        fused: whether fused projections are offered whole, as slices, or both.
        budget: sizes that cost more than its limit are left out.
        energies: what `energies` gave for the same first three arguments, `fused` and `budget`; computed when None.

    Raises:
        UsageError: when a method predicts a gain that is not finite.
    """
    known = (
        energies if energies is not None else _measure(catalog, methods, scores, fused, budget, False, policy.tangent)
    )
    scale = {
        key: policy.methods.get(key, 1.0) * policy.calibration.get(method.family, 1.0)
        for key, method in methods.items()
    }
    factor = np.array([scale.get(o.method, 0.0) for o in known.options])
    roles = np.array([policy.roles.get(group, 1.0) for group in known.groups])
    bend = np.exp(policy.depth_tilt * known.depths + policy.depth_curvature * (known.depths**2 - 1 / 3))
    gains = factor * roles * bend * np.copysign(np.abs(known.values) ** policy.exponent, known.values)
    options = tuple(
        Option(o.site, o.method, o.size, o.cost, gain, o.places)
        for o, gain, offered in zip(known.options, gains.tolist(), (factor > 0).tolist(), strict=True)
        if offered
    )
    return Menu(on_hull(options, budget) if policy.hull else options, known.sites, known.scores)


def _measure(
    catalog: Catalog,
    methods: Mapping[str, Method],
    scores: Scores,
    fused: Fused,
    budget: Budget,
    mergeable: bool,
    tangent: Collection[str],
) -> Energies:
    sites = {site.name: site for site in catalog.offered(fused)}
    known = {name: evidence for name, site in sites.items() if (evidence := scores.about(site)) is not None}
    options = [
        option
        for name, evidence in known.items()
        for key, method in methods.items()
        if not mergeable or method.mergeable(sites[name])
        for option in _options(
            catalog, sites[name], key, method, evidence, scores.origin.scorer, budget, key in tangent
        )
    ]
    options.sort(key=lambda o: o.order)
    best: dict[str, float] = {}
    for o in options:
        best[o.site] = max(best.get(o.site, 0.0), o.gain)
    total = math.fsum(best.values()) or 1.0
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
    )


def _options(
    catalog: Catalog,
    site: Site,
    key: str,
    method: Method,
    evidence: Evidence,
    scorer: str,
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
    if method.family == "entries":
        evidence = cross_valued(evidence)
    try:
        gains = (_tangent(method, site, evidence, sizes) if tangent else None) or method.gains(site, evidence, sizes)
    except UsageError:
        # The scorer kept nothing for a slot that this method changes: it cannot be compared, so it is not offered.
        return []
    for (size, _), gain in zip(priced, gains, strict=True):
        if not math.isfinite(gain):
            raise UsageError(
                f"method {key!r} of size {size} predicts a gain of {gain} at {site.name}; "
                f"the scores of {scorer} there are not usable"
            )
    return [
        Option(site.name, key, size, cost, float(gain), places)
        for (size, cost), gain in zip(priced, gains, strict=True)
    ]


def _tangent(method: Method, site: Site, evidence: Evidence, sizes: list[int]) -> tuple[float, ...] | None:
    # Imports torch, and whoever reads a study imports this module.
    from autopeft.allocation.tangent import tangent_gains

    return tangent_gains(method, site, evidence, sizes)
