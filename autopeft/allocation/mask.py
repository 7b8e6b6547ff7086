"""Masks over groups of sites: every bit keeps or drops what a method would train there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np

from autopeft.allocation import _mckp
from autopeft.allocation._cover import serves_as_well
from autopeft.allocation._groups import Group
from autopeft.allocation._layouts import LAYOUTS, Groups, matches
from autopeft.core.allocation import Allocation, Provenance
from autopeft.core.budget import Budget
from autopeft.core.menu import Menu, Option
from autopeft.core.site import Place, Site
from autopeft.core.space import Knob, Space, Value
from autopeft.errors import InfeasibleBudget, UsageError

__all__ = ["Mask", "Over"]

Over = Literal["repair", "refuse"]
"""What becomes of a mask that costs more than the budget."""

_FLOOR = 1e-6
"""Share of the mean that a group without any predicted gain is worth, so that it is dropped first and not for free."""

_OFF: tuple[Value, ...] = (0, "0", "off")
_ON: tuple[Value, ...] = (1, "1", "on")

_Bought = dict[tuple[str, str], list[Option]]
"""(site, method) to the sizes on the menu, smallest first."""


@dataclass(frozen=True, slots=True)
class Mask:
    """Buys what a mask keeps, within the budget.

    A bit belongs to a group of sites: 0 (`off`) drops the masked methods there, 1 (`on`) buys all of them, a method's
    key buys that one alone. Methods that are not masked are always bought; masked ones outside of every group when
    `outside` says so. Where two options ask for one place, the method that is listed first has it; without a list they
    come in the order of their keys.

    A mask that costs more than the budget is repaired, so that every point of the search is feasible: options of
    several sizes shrink to the largest common one that fits; where not even the smallest fits, the groups that stay are
    those of the largest total `weights[group] * predicted gain`, by the exact knapsack. What the bits cannot switch
    must fit.

    Attributes:
        layout: how sites are grouped: `blocks`, `stages`, `attention`, `roles`, `unet_attention` (the attention modules
            of a diffusers U-Net), or one of MemControl's, which say the methods as well: `memcontrol_svdiff`,
            `memcontrol_difffit`, `memcontrol_attention`.
        groups: name of a group to patterns of its sites' names (`blocks.[0-5].*`); given, it takes the place of the
            layout's.
        bits: group to bit, 1 for groups that are not named.
        weights: group to what its gain counts when not all groups fit, 1 for groups that are not named.
        methods: method key to patterns of the sites it may go on; given, it takes the place of the layout's.
        masked: the methods that bits switch; given, it takes the place of the layout's.
        outside: whether masked methods are bought outside of the groups; the layout's rule when None.
        sizes: method key to the largest size it may have.
        over: `repair`, or `refuse` a mask whose smallest sizes do not fit.

    Raises:
        UsageError: naming the field and the value that is out of range.
    """

    layout: str = "blocks"
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict, hash=False)
    bits: Mapping[str, int | str] = field(default_factory=dict, hash=False)
    weights: Mapping[str, float] = field(default_factory=dict, hash=False)
    methods: Mapping[str, tuple[str, ...]] = field(default_factory=dict, hash=False)
    masked: tuple[str, ...] = ()
    outside: bool | None = None
    sizes: Mapping[str, int] = field(default_factory=dict, hash=False)
    over: Over = "repair"

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise UsageError(f"the layout of a mask is one of {', '.join(LAYOUTS)}, got {self.layout!r}")
        if self.over not in get_args(Over):
            raise UsageError(f"over of a mask must be one of {', '.join(get_args(Over))}, got {self.over!r}")
        for group, weight in self.weights.items():
            if not (weight >= 0 and np.isfinite(weight)):
                raise UsageError(f"the weight of group {group!r} must be finite and at least 0, got {weight}")
        for method, size in self.sizes.items():
            if size < 1:
                raise UsageError(f"the largest size of method {method!r} must be at least 1, got {size}")
        for group, bit in self.bits.items():
            if isinstance(bit, int) and bit not in (0, 1):
                raise UsageError(f"the bit of group {group!r} must be 0, 1 or the key of a method, got {bit}")

    def space(self, sites: Iterable[Site], methods: Sequence[str] = ()) -> Space:
        """The bits as knobs, for a search over masks on one model; on by default.

        Args:
            sites: the model's sites.
            methods: keys of methods that a bit may choose from; without them bits are binary.
        """
        choices: tuple[Value, ...] = ("off", "on", *methods) if methods else (0, 1)
        return Space(
            tuple(Knob(f"allocator.bits.{name}", choices=choices, default=choices[1]) for name in self._grouped(sites))
        )

    def allocate(self, menu: Menu, budget: Budget, seed: int = 0) -> Allocation:
        """The plan of this mask.

        Args:
            menu: the options; gains count only in the repair.
            budget: the limit.
            seed: not used.

        Raises:
            InfeasibleBudget: when what the bits cannot switch does not fit; when the budget buys none of the groups
                that are on; or when the mask does not fit and `over` is `refuse`.
            UsageError: when a bit or a weight belongs to no group, or two groups ask for one place.
        """
        groups = self._grouped(menu.sites.values())
        self._check(groups, menu)
        fixed, switched, broke = self._offered(menu, groups)
        chosen = {name: switched[name] for name in switched if name not in broke}
        least = {name: _total(bought, budget, 1) for name, bought in chosen.items()}
        floor = _total(fixed, budget, 1)
        if floor > budget.limit:
            raise InfeasibleBudget(
                f"what no bit of the mask can switch off costs {floor:,}, more than the budget of {budget}; raise the "
                f"budget to at least {floor:,}, or give fewer methods or sites",
                floor,
            )
        room = budget.limit - floor
        if self.over == "refuse" and (broke or sum(least.values()) > room):
            price = floor + sum(least.values())
            known = "" if broke else f" It costs {price:,}; raise the budget to that."
            raise InfeasibleBudget(
                f"the mask does not fit into a budget of {budget}.{known} Switch groups off, or let it be repaired "
                f"(over: repair)",
                None if broke else price,
            )
        kept = self._packed(chosen, least, room)
        if switched and not kept and not fixed:
            cheapest = min(least.values(), default=None)
            price_text = "" if cheapest is None else f": the cheapest costs {cheapest:,}"
            raise InfeasibleBudget(f"a budget of {budget} buys none of the groups of the mask{price_text}", cheapest)
        parts = [fixed, *(chosen[name] for name in kept)]
        caps = sorted({o.size for bought in parts for options in bought.values() for o in options}, reverse=True)
        cap = next((c for c in caps if sum(_total(bought, budget, c) for bought in parts) <= budget.limit), 1)
        plan = tuple(_at(options, cap) for bought in parts for options in bought.values())
        scorer = menu.scores.origin.scorer if menu.scores is not None else ""
        return Allocation(plan, budget, Provenance(f"mask({self.layout}: {' '.join(kept) or 'all off'})", scorer))

    def _grouped(self, sites: Iterable[Site]) -> Groups:
        if self.groups:
            return self.groups
        listed = list(sites)
        found = LAYOUTS[self.layout].groups(listed)
        if listed and not found:
            raise UsageError(
                f"the layout {self.layout!r} finds no group of sites on this model, so that no bit would switch "
                f"anything; choose another one of {', '.join(LAYOUTS)}, or give groups"
            )
        return found

    def _check(self, groups: Groups, menu: Menu) -> None:
        keys = {o.method for o in menu.options}
        for what, names in (("bit", self.bits), ("weight", self.weights)):
            for name in names:
                if name not in groups:
                    known = ", ".join(groups) or "none"
                    raise UsageError(f"the mask has a {what} for {name!r}, which is none of its groups: {known}")
        for name, bit in self.bits.items():
            if bit not in (*_OFF, *_ON, *keys, *self._methods(menu)):
                known = ", ".join(sorted(keys))
                raise UsageError(f"the bit of group {name!r} names {bit!r}; write 0, 1 or one of the methods {known}")

    def _methods(self, menu: Menu) -> Mapping[str, Sequence[str]]:
        """Method key to patterns, in the order in which methods take places."""
        stated = self.methods or LAYOUTS[self.layout].methods
        return stated or dict.fromkeys(sorted({o.method for o in menu.options}), ("*", "block:*"))

    def _offered(self, menu: Menu, groups: Groups) -> tuple[_Bought, dict[str, _Bought], set[str]]:
        """What is always bought, what each group that is on buys, and the groups that hold a site that cannot pay."""
        methods, layout = self._methods(menu), LAYOUTS[self.layout]
        masked = set(self.masked or ((set(methods) & set(layout.masked)) or methods))
        outside = layout.outside if self.outside is None else self.outside
        home = _homes(menu.sites.values(), groups)
        on: dict[str, _Bought] = {g: {} for g in groups if self.bits.get(g, 1) not in _OFF}
        fixed: _Bought = {}
        broke: set[str] = set()
        owner: dict[Place, tuple[str, str]] = {}
        for method, patterns in methods.items():
            options = self._sizes_of(menu, method, patterns)
            for (name, _), sizes in options.items():
                group = home.get(name, "") if method in masked else ""
                if group:
                    if group not in on or self.bits.get(group, 1) not in (*_ON, method):
                        continue
                elif not outside and method in masked:
                    continue
                taken = [owner[p] for p in sizes[0].places if p in owner]
                if any(other != group for other, by in taken if by == method):
                    raise UsageError(f"two groups of the mask ask for {method} on the places of {name}; part them")
                if taken:
                    continue
                owner.update(dict.fromkeys(sizes[0].places, (group, method)))
                (on[group] if group else fixed)[name, method] = sizes
            if method in masked:
                broke |= {
                    home[s.name]
                    for s in _too_dear(menu, method, patterns)
                    if home.get(s.name) in on and self.bits.get(home[s.name], 1) in (*_ON, method)
                }
        return fixed, {name: bought for name, bought in on.items() if bought}, broke

    def _sizes_of(self, menu: Menu, method: str, patterns: Sequence[str]) -> _Bought:
        """Sizes of a method per site that it may go on, whole projections before their slices."""
        found: _Bought = {}
        most = self.sizes.get(method)
        for o in menu.options:
            if o.method == method and (most is None or o.size <= most) and matches(menu.sites[o.site], patterns):
                found.setdefault((o.site, method), []).append(o)
        ordered = sorted(found, key=lambda key: (bool(menu.sites[key[0]].parent), key))
        return {key: sorted(found[key], key=lambda o: o.size) for key in ordered}

    def _packed(self, chosen: Mapping[str, _Bought], least: Mapping[str, int], room: int) -> list[str]:
        """The groups that stay."""
        names = list(chosen)
        if sum(least.values()) <= room:
            return names
        gains = np.array([max(0.0, sum(s[0].gain for s in chosen[n].values())) for n in names])
        mean = gains.mean()
        shares = gains / mean if mean > 0 else np.ones(len(names))
        weights = np.array([self.weights.get(n, 1.0) for n in names])
        values = weights * np.maximum(shares, _FLOOR)
        items = [
            Group(np.array([0, least[n]]), np.array([0.0, value]), np.array([[-1], [i]]))
            for i, (n, value) in enumerate(zip(names, values.tolist(), strict=True))
            if value > 0 and least[n] <= room
        ]
        packing = _mckp.solve(items, room) if items else None
        kept = {int(g.picks[item, 0]) for g, item in zip(items, packing.items, strict=True)} if packing else set()
        return [n for i, n in enumerate(names) if i in kept]


def _homes(sites: Iterable[Site], groups: Groups) -> dict[str, str]:
    """Name of a site to its group.

    Raises:
        UsageError: when a site lies in two groups.
    """
    home: dict[str, str] = {}
    for site in sites:
        inside = [name for name, patterns in groups.items() if matches(site, patterns)]
        if len(inside) > 1:
            raise UsageError(f"{site.name} lies in the groups {' and '.join(sorted(inside))} of the mask; keep one")
        if inside:
            home[site.name] = inside[0]
    return home


def _too_dear(menu: Menu, method: str, patterns: Sequence[str]) -> list[Site]:
    """Sites that the method could be on if the budget paid for its smallest size there."""
    offered = [menu.sites[name] for name in {o.site for o in menu.options if o.method == method}]
    names = {s.name for s in offered}
    single = [s for s in offered if s.kind != "group"]
    return [
        site
        for site in menu.sites.values()
        if site.name not in names
        and site.kind != "group"
        and matches(site, patterns)
        and any(site.role == other.role and serves_as_well(site, other) for other in single)
    ]


def _at(options: Sequence[Option], cap: int) -> Option:
    """The largest size up to a cap; the smallest where all are larger."""
    fitting = [o for o in options if o.size <= cap]
    return fitting[-1] if fitting else options[0]


def _total(bought: _Bought, budget: Budget, cap: int) -> int:
    return sum(_at(options, cap).cost.of(budget.unit) for options in bought.values())
