"""From scores to a menu: every option of every site with its price and its corrected gain."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from autopeft.allocation._roles import ROLE_GROUPS
from autopeft.allocation.energies import energies as captured
from autopeft.allocation.hull import on_hull
from autopeft.core.menu import Menu, Option
from autopeft.errors import UsageError

if TYPE_CHECKING:
    from autopeft.allocation.energies import Energies
    from autopeft.core.budget import Budget
    from autopeft.core.contracts import Method
    from autopeft.core.scores import Scores
    from autopeft.core.site import Catalog, Fused

__all__ = ["CALIBRATION", "GainPolicy", "build_menu"]

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

    With a price on memorisation, d the change that the option's step makes to it as a share of the model's
    (`Energies.memories`), an option is worth its gain `phi e`, less `price * phi d`: what scales the step's gain scales
    its change alike, so that a plan's total change never grows with the price (`Menu` of all sizes, exact packing).

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
        hull: whether to offer the options on the concave hull of each place's gains alone (`on_hull`), after the price.
        price: of memorisation, in gains; 0 does not look at it. At 1 a plan that changes memorisation by all that the
            model's best options could is worth its gain less that of all of these. It needs scores that measured
            memorisation (`scorer=calibrated scorer.memory=noise_difference`, or `gap`), and acts through the gains:
            allocators that do not read these (`mask`, `random`, `spt`, `uniform`) do not see it. Options that are then
            worth nothing are not offered.

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
    price: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.exponent <= 1:
            raise UsageError(f"gain.exponent must be above 0 and at most 1, got {self.exponent}")
        for name in ("depth_tilt", "depth_curvature"):
            value = getattr(self, name)
            if not abs(value) <= 20:
                raise UsageError(f"gain.{name} must lie between -20 and 20, got {value}")
        if not (math.isfinite(self.price) and self.price >= 0):
            raise UsageError(f"gain.price must be finite and at least 0 (no price), got {self.price}")
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
        UsageError: when a method predicts a gain that is not finite, or memorisation has a price and the scorer
            measured nothing of it.
    """
    known = (
        energies
        if energies is not None
        else captured(catalog, methods, scores, fused=fused, budget=budget, tangent=policy.tangent)
    )
    scale = {
        key: policy.methods.get(key, 1.0) * policy.calibration.get(method.family, 1.0)
        for key, method in methods.items()
    }
    factor = np.array([scale.get(o.method, 0.0) for o in known.options])
    roles = np.array([policy.roles.get(group, 1.0) for group in known.groups])
    bend = np.exp(policy.depth_tilt * known.depths + policy.depth_curvature * (known.depths**2 - 1 / 3))
    gains = factor * roles * bend * np.copysign(np.abs(known.values) ** policy.exponent, known.values)
    offered, changes = factor > 0, [None] * len(known.options)
    if policy.price:
        moved = _changes(known, gains, policy.price)
        gains, changes = gains - policy.price * moved, moved.tolist()
        offered &= gains > 0
    options = tuple(
        Option(o.site, o.method, o.size, o.cost, gain, o.places, memory=change)
        for o, gain, change, there in zip(known.options, gains.tolist(), changes, offered.tolist(), strict=True)
        if there
    )
    return Menu(on_hull(options, budget) if policy.hull else options, known.sites, known.scores)


def _changes(known: Energies, gains: Any, price: float) -> Any:
    """Changes of memorisation, scaled as the gains are scaled against the energies."""
    if known.memories is None:
        scorer = known.scores.origin.scorer if known.scores is not None else "none"
        raise UsageError(
            f"gain.price is {price:g}, but the scores measured nothing of memorisation (scorer {scorer}); set "
            "scorer=calibrated and scorer.memory=noise_difference (task diffusion) or gap (any task), or gain.price=0"
        )
    values = np.where(known.values == 0, 1.0, known.values)
    return np.where(known.values == 0, 0.0, gains / values) * known.memories
