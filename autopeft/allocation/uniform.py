"""One method, one size, everywhere: what people do by hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from autopeft.allocation._cover import serves_as_well
from autopeft.allocation._roles import role_group
from autopeft.core.allocation import Allocation, Provenance
from autopeft.core.budget import Budget
from autopeft.core.menu import Menu, Option
from autopeft.core.site import Site
from autopeft.errors import InfeasibleBudget, UsageError

__all__ = ["Target", "Uniform"]

Target = Literal["qv", "qkv", "attn", "mlp", "all"]
"""Query and value slices; all three; attention with its output projection; the MLP; everything."""

_GROUPS: dict[str, tuple[str, ...]] = {"qkv": ("qkv",), "attn": ("qkv", "proj"), "mlp": ("mlp",)}


@dataclass(frozen=True, slots=True)
class Uniform:
    """The largest common size of one method that fits on all matching sites.

    With target `all` the stem is left out for methods that change the weights of matrices, as published LoRA baselines
    leave it out; every other method (bias, norm, ...) goes on every site of the menu. Methods without sizes are bought
    on all sites or on none. Where a menu offers a projection whole and by slices, the whole is taken.

    Attributes:
        method: key of the method.
        target: which sites.

    Raises:
        UsageError: for an unknown target.
    """

    method: str = "lora"
    target: Target = "qv"

    def __post_init__(self) -> None:
        if self.target not in get_args(Target):
            raise UsageError(f"uniform: the target is one of {', '.join(get_args(Target))}, got {self.target!r}")

    def allocate(self, menu: Menu, budget: Budget, seed: int = 0) -> Allocation:
        """The same size on every matching site.

        Args:
            menu: the options; gains are not looked at. A matching site without an option of the method, because even
                its smallest size is above the budget, makes the plan infeasible: leaving it out would not be uniform.
            budget: the limit.
            seed: not used.

        Raises:
            InfeasibleBudget: when no common size fits, naming what the cheapest one costs; or when the menu has no
                option of the method on the target at all.
        """
        matching = self._matching(menu)
        where = f"{self.method!r} on {self.target}"
        if not any(matching.values()):
            hint = " (query and value need a menu of slices)" if self.target == "qv" else ""
            raise InfeasibleBudget(f"a budget of {budget} offers no {where} at any site of this menu{hint}")
        unaffordable = [name for name, options in matching.items() if not options]
        if unaffordable:
            raise InfeasibleBudget(
                f"a budget of {budget} does not buy {where} uniformly: not even its smallest size is on the menu at "
                f"{len(unaffordable)} of {len(matching)} sites, such as {unaffordable[0]}"
            )
        by_size = [{o.size: o for o in options} for options in matching.values()]
        common = sorted(set.intersection(*(set(sizes) for sizes in by_size)))
        totals = {size: sum(sizes[size].cost.of(budget.unit) for sizes in by_size) for size in common}
        fitting = [size for size in common if totals[size] <= budget.limit]
        if not fitting:
            cheapest = min(totals.values(), default=None)
            price = f"size {common[0]} costs {totals[common[0]]:,}" if common else "its sites share no size"
            raise InfeasibleBudget(
                f"a budget of {budget} does not buy {where} uniformly: on {len(by_size)} sites {price}", cheapest
            )
        chosen = tuple(sizes[fitting[-1]] for sizes in by_size)
        return Allocation(chosen, budget, Provenance(f"uniform(method={self.method!r}, target={self.target!r})"))

    def _matching(self, menu: Menu) -> dict[str, list[Option]]:
        """Options of the method per matching site; an empty list where only the budget can have left them out."""
        offered: dict[str, list[Option]] = {}
        for option in menu.options:
            if option.method == self.method:
                offered.setdefault(option.site, []).append(option)
        if any(menu.sites[name].kind == "group" for name in offered if name in menu.sites):
            return _widest(offered)
        known = [menu.sites[name] for name in offered]
        sites = {
            name: site
            for name, site in sorted(menu.sites.items())
            if self._aims_at(site)
            and (name in offered or any(serves_as_well(site, other) for other in known))
            and not (self.target == "all" and site.role == "stem" and _on_matrix(site, offered.get(name, [])))
        }
        if self.target != "qv":
            sites = {name: site for name, site in sites.items() if not (site.parent and site.parent in sites)}
        return {name: offered.get(name, []) for name in sites}

    def _aims_at(self, site: Site) -> bool:
        if self.target == "all":
            return True
        if self.target == "qv":
            return site.role in ("attn.q", "attn.v")
        return role_group(site) in _GROUPS[self.target]


def _widest(offered: dict[str, list[Option]]) -> dict[str, list[Option]]:
    """Of the ways to cover the model by groups (`*`, one per role, one per block) the one that reaches most places."""
    ways: dict[str, dict[str, list[Option]]] = {}
    for name, options in offered.items():
        ways.setdefault(name.partition(":")[0] + ":" * (":" in name), {})[name] = options

    def reach(way: dict[str, list[Option]]) -> int:
        return len({place for options in way.values() for option in options for place in option.places})

    return max((ways[name] for name in sorted(ways)), key=reach)


def _on_matrix(site: Site, options: list[Option]) -> bool:
    """Whether options here change the weight of a matrix; true without options, as for a site that cannot pay."""
    return site.is_matrix and all(any(place.slot == "weight" for place in o.places) for o in options)
