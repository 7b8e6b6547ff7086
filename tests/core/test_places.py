from __future__ import annotations

from dataclasses import dataclass

from autopeft.core.places import places_of
from autopeft.core.site import Catalog, Place, Site, Slot


def site(name: str, parts: tuple[str, ...] = (), rows: tuple[int, int] | None = None, parent: str = "") -> Site:
    shape = (4, 2) if rows is None else (rows[1] - rows[0], 2)
    return Site(name, parent or name, "linear", shape, True, 0, "attn.qkv", ("weight", "bias"), rows, parts, parent)


CATALOG = Catalog(
    (
        site("a", ("a[q]", "a[k]")),
        site("a[q]", rows=(0, 2), parent="a"),
        site("a[k]", rows=(2, 4), parent="a"),
        site("b"),
    ),
    (),
    24,
    0,
    1,
)


@dataclass(frozen=True)
class OnWeights:
    """A method of single sites."""

    def slots(self, site: Site) -> tuple[Slot, ...]:
        return ("weight",) if site.kind == "linear" else ()


@dataclass(frozen=True)
class OnGroups:
    """The weight of a group's first member and the bias of the others; the rest of the contract is not looked at."""

    family = "vector"
    sizes = cost = mergeable = build = gains = select = staticmethod(tuple)

    def slots(self, site: Site) -> tuple[Slot, ...]:
        return ("weight", "bias") if site.kind == "group" else ()

    def parts(self, site: Site) -> tuple[tuple[Site, tuple[Slot, ...]], ...]:
        first, *others = site.members
        return ((first, ("weight",)), *((other, ("bias",)) for other in others))


def test_a_whole_occupies_its_slices() -> None:
    assert places_of(CATALOG, OnWeights(), CATALOG["a"]) == (Place("a[k]", "weight"), Place("a[q]", "weight"))
    assert places_of(CATALOG, OnWeights(), CATALOG["b"]) == (Place("b", "weight"),)


def test_a_group_occupies_what_its_parts_say() -> None:
    group = CATALOG["*"]
    assert [m.name for m in group.members] == ["a", "b"]
    assert places_of(CATALOG, OnGroups(), group) == (
        Place("a[k]", "weight"), Place("a[q]", "weight"), Place("b", "bias"),
    )  # fmt: skip


def test_methods_of_single_sites_occupy_nothing_of_a_group() -> None:
    assert places_of(CATALOG, OnWeights(), CATALOG["*"]) == ()
