"""Side constraints of the knapsack: what may be offered, what goes together, and linear rows over what is chosen."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from autopeft.allocation._selectors import METHOD, Selectors, touched
from autopeft.core.budget import Cost
from autopeft.core.menu import Menu, Option
from autopeft.errors import UsageError

__all__ = ["Bundle", "Row", "Rules", "bundles_of", "offered", "rows_of", "shares_of"]


class Rules(Protocol):
    """The settings that are read here; see `Knapsack`."""

    @property
    def require(self) -> tuple[str, ...]: ...
    @property
    def forbid(self) -> tuple[str, ...]: ...
    @property
    def max_options(self) -> int | None: ...
    @property
    def max_methods(self) -> int | None: ...
    @property
    def max_size(self) -> Mapping[str, int]: ...
    @property
    def tie(self) -> tuple[str, ...]: ...
    @property
    def every_block(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class Bundle:
    """Options that are bought together or not at all.

    Attributes:
        option: what the solver sees: the places, costs and gains of all of them.
        members: the options themselves; one, where nothing is tied.
    """

    option: Option
    members: tuple[Option, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """`low <= sum of values over the chosen ones of these positions <= high`.

    Attributes:
        what: what is asked for, as the end of "... does not buy".
        members: positions of bundles.
        values: one number per position.
        low: -inf for no lower limit.
        high: inf for no upper limit.
    """

    what: str
    members: tuple[int, ...]
    values: tuple[float, ...]
    low: float = -math.inf
    high: float = math.inf

    def kept(self, chosen: Iterable[int]) -> bool:
        """Whether a choice keeps it."""
        value = dict(zip(self.members, self.values, strict=True))
        return self.low <= math.fsum(value.get(i, 0.0) for i in chosen) <= self.high


def offered(menu: Menu, rules: Rules, known: Selectors) -> tuple[Option, ...]:
    """The options that `forbid` and `max_size` leave.

    Raises:
        UsageError: when `forbid` names what is not on the menu.
    """
    methods = {key for text in rules.forbid if text.startswith(METHOD) for key in known.keys(text)}
    sites = {name for text in rules.forbid if not text.startswith(METHOD) for name in known.sites(text, "forbid")}
    return tuple(
        o
        for o in menu.options
        if o.size <= rules.max_size.get(o.method, o.size) and o.method not in methods and not sites & touched(o)
    )


def bundles_of(options: Sequence[Option], rules: Rules, known: Selectors) -> tuple[Bundle, ...]:
    """The options, tied ones together, in canonical order of what the solver sees.

    Within a tie every site that offers a method takes it in one size, or none of them takes it; sizes that one of the
    sites does not offer are not offered at all.

    Raises:
        UsageError: when a tie holds sites that share a place, or names what is not on the menu.
    """
    if not rules.tie:
        return tuple(Bundle(o, (o,)) for o in options)
    tie: dict[str, str] = {}
    for text in rules.tie:
        if text == "role":
            groups = {name: f"role:{role}" for name in known.names if (role := known.role(name)) not in ("", "group")}
        else:
            groups = dict.fromkeys(known.sites(text, "tie"), text)
        for name, group in groups.items():
            tie.setdefault(name, group)
    tied: dict[tuple[str, str], dict[int, list[Option]]] = {}
    found = []
    for o in options:
        if o.site in tie:
            tied.setdefault((tie[o.site], o.method), {}).setdefault(o.size, []).append(o)
        else:
            found.append(Bundle(o, (o,)))
    for (group, method), by_size in tied.items():
        sites = {o.site for members in by_size.values() for o in members}
        whole = {size: members for size, members in by_size.items() if len(members) == len(sites)}
        found += [Bundle(_together(group, method, size, members), tuple(members)) for size, members in whole.items()]
    return tuple(sorted(found, key=lambda b: b.option.order))


def _together(group: str, method: str, size: int, members: Sequence[Option]) -> Option:
    places = [place for o in members for place in o.places]
    twice = next((place for place in places if places.count(place) > 1), None)
    if twice is not None:
        sites = ", ".join(o.site for o in members if twice in o.places)
        raise UsageError(
            f"tie {group!r} of the knapsack holds {sites}, which share {twice}; tie the whole or the slices"
        )
    cost = Cost.zero()
    for o in members:
        cost = cost + o.cost
    name = members[0].site if len(members) == 1 else group
    return Option(name, method, size, cost, math.fsum(o.gain for o in members), tuple(sorted(places)))


def rows_of(bundles: Sequence[Bundle], rules: Rules, known: Selectors) -> tuple[Row, ...]:
    """The linear rows of everything that is required or counted; `max_methods` and caps need columns of their own.

    Raises:
        UsageError: when `require` names what is not on the menu.
    """
    rows = []
    for text in rules.require:
        if text.startswith(METHOD):
            wanted = set(known.keys(text))
            rows.append(_cover(f"an option of {text}", [any(o.method in wanted for o in b.members) for b in bundles]))
            continue
        names = known.sites(text, "require")
        several = names != (text,)
        at = [_cover(f"an option at {name}", [name in _inside(b) for b in bundles]) for name in names]
        # A glob asks for what can be had: not for a site where the menu has nothing.
        rows += [row for row in at if row.members] if several else at
        if several and not any(row.members for row in at):
            rows.append(Row(f"an option at any of {text}", (), (), 1.0))
    if rules.every_block:
        rows += _blocks(bundles, known)
    if rules.max_options is not None:
        sizes = tuple(float(len(b.members)) for b in bundles)
        rows.append(
            Row(f"at most {rules.max_options} options", tuple(range(len(bundles))), sizes, high=rules.max_options)
        )
    return tuple(rows)


def _cover(what: str, fits: Sequence[bool]) -> Row:
    members = tuple(i for i, fit in enumerate(fits) if fit)
    return Row(what, members, (1.0,) * len(members), 1.0)


def _blocks(bundles: Sequence[Bundle], known: Selectors) -> list[Row]:
    """At least one option that reaches into each block which the menu offers anything in."""
    reach = [{known.depth(name) for o in b.members for name in touched(o)} - {None} for b in bundles]
    depths = sorted({d for depths in reach for d in depths if d is not None})
    return [
        Row(f"an option in block {depth}", members, (1.0,) * len(members), 1.0)
        for depth in depths
        if (members := tuple(i for i, inside in enumerate(reach) if depth in inside))
    ]


def shares_of(bundles: Sequence[Bundle], known: Selectors) -> tuple[Mapping[int, float], ...]:
    """Per block, and for what lies in none: position of a bundle to the share of its gain that counts there."""
    blocks: dict[int, dict[int, float]] = {}
    for i, bundle in enumerate(bundles):
        depths = sorted({-1 if (d := known.depth(name)) is None else d for name in _inside(bundle)})
        inside = [d for d in depths if d >= 0] or [-1]
        for depth in inside:
            blocks.setdefault(depth, {})[i] = 1 / len(inside)
    return tuple(blocks[depth] for depth in sorted(blocks))


def _inside(bundle: Bundle) -> frozenset[str]:
    return frozenset(name for o in bundle.members for name in touched(o))
