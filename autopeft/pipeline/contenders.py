"""Who competes at one budget: the baselines, and our plan without any search.

A group is one contender with its variants (target modules, draws). Every group gets the same number of learning rates
from `pipeline.tune`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, get_args

from autopeft.allocation.head_only import HeadOnly
from autopeft.allocation.indices import attach_indices
from autopeft.allocation.random import RandomMix
from autopeft.allocation.spt import SPT
from autopeft.allocation.uniform import Target, Uniform
from autopeft.core.allocation import Allocation
from autopeft.core.menu import Menu, Option
from autopeft.core.places import places_of
from autopeft.core.record import Role
from autopeft.core.scores import Evidence, Scores
from autopeft.core.site import Fused
from autopeft.errors import InfeasibleBudget
from autopeft.pipeline.plan import make_menu, make_plan

if TYPE_CHECKING:
    from autopeft.config.study import Study
    from autopeft.pipeline.prepare import Prepared

__all__ = ["Candidate", "Group", "contender_groups", "spt_scores"]

_LORA_TARGETS: tuple[Target, ...] = get_args(Target)
_SINGLE_METHODS = ("bias", "norm", "ssf")
_RANDOM_DRAWS = 2
_SPT_RANKS = (8, 1)
"""As released, and the only rank whose modules a budget of 0.1 % can buy on small models."""


@dataclass(frozen=True)
class Candidate:
    """One plan under a name."""

    name: str
    allocation: Allocation


@dataclass(frozen=True)
class Group:
    """One contender: variants of one idea, of which the best is kept."""

    name: str
    role: Role
    candidates: tuple[Candidate, ...]


def contender_groups(prepared: Prepared, study: Study) -> tuple[Group, ...]:
    """The outside baselines at this budget, then the default plan.

    Head only, where there is a head; uniform LoRA on the usual target sets at the largest rank that fits (on as many
    of the last blocks as fit when rank 1 on every block does not); one core matrix of the same size everywhere
    (LoRA-XS); the single cheap methods; SPT; random feasible mixes; the default plan.
    Contenders that this budget or these methods cannot express are left out.
    """
    head_only = Candidate("head only", HeadOnly().allocate(Menu(()), prepared.budget))
    groups = [
        Group("head only", "baseline", (head_only,) if prepared.catalog.head else ()),
        _group("uniform lora", _uniform_loras(prepared, study)),
        _group("uniform core", _everywhere(prepared, study, ("core",))),
        _group("single method", _everywhere(prepared, study, _SINGLE_METHODS)),
        _group("spt", _spt(prepared, study)),
        _group("random mix", _random_mixes(prepared, study)),
    ]
    default = Group("default plan", "default", (Candidate("default plan", make_plan(prepared, study)),))
    return (*(g for g in groups if g.candidates), default)


def spt_scores(scores: Scores) -> Scores:
    """The same evidence ranked as SPT ranks it, by squared gradients, whatever the study's scorer ranks by."""
    evidence = {
        name: Evidence(
            item.site,
            {
                slot: dataclasses.replace(t, score=t.square if t.square is not None else t.score)
                for slot, t in item.slots.items()
            },
        )
        for name, item in scores.evidence.items()
    }
    return Scores(scores.origin, scores.totals, evidence)


def _group(name: str, candidates: Iterable[Candidate]) -> Group:
    distinct: dict[str, Candidate] = {}
    for candidate in candidates:
        distinct.setdefault(candidate.allocation.digest, candidate)
    return Group(name, "baseline", tuple(distinct.values()))


def _try(name: str, make: Callable[[], Allocation]) -> Iterable[Candidate]:
    try:
        allocation = make()
    except InfeasibleBudget:
        return
    if len(allocation):
        yield Candidate(name, allocation)


def _priced_menu(prepared: Prepared, study: Study, keys: Iterable[str], fused: Fused) -> Menu:
    """Options with prices and no predicted gains, for allocators that do not look at gains."""
    sites = {site.name: site for site in prepared.catalog.offered(fused)}
    options = []
    for key in keys:
        method = study.methods[key]
        for site in sites.values():
            places = places_of(prepared.catalog, method, site)
            if not places or (study.mergeable and not method.mergeable(site)):
                continue
            for size in method.sizes(site):
                cost = method.cost(site, size)
                if cost.of(prepared.budget.unit) > prepared.budget.limit:
                    break
                options.append(Option(site.name, key, size, cost, 0.0, places))
    return Menu(tuple(options), sites)


def _last_blocks(menu: Menu, first_depth: int) -> Menu:
    sites = {name: site for name, site in menu.sites.items() if site.depth >= first_depth}
    return Menu(tuple(o for o in menu.options if o.site in sites), sites, menu.scores)


def _uniform(prepared: Prepared, study: Study, menu: Menu, allocator: Uniform, name: str) -> Iterable[Candidate]:
    """The allocator on every block, or on as many of the last blocks as the budget reaches."""
    depth = prepared.catalog.n_depth
    for first in range(depth):
        part = menu if first == 0 else _last_blocks(menu, first)
        where = "" if first == 0 else f", last {depth - first} of {depth} blocks"

        def place(part: Menu = part) -> Allocation:
            plan = allocator.allocate(part, prepared.budget)
            return attach_indices(plan, study.methods, prepared.scores_for(study), part.sites)

        found = list(_try(name + where, place))
        if found:
            yield from found
            return


def _uniform_loras(prepared: Prepared, study: Study) -> Iterable[Candidate]:
    if "lora" not in study.methods:
        return
    whole = _priced_menu(prepared, study, ["lora"], "whole")
    slices = _priced_menu(prepared, study, ["lora"], "slices")
    for target in _LORA_TARGETS:
        menu = slices if target == "qv" else whole
        yield from _uniform(prepared, study, menu, Uniform("lora", target), f"uniform lora ({target})")


def _everywhere(prepared: Prepared, study: Study, keys: Iterable[str]) -> Iterable[Candidate]:
    for key in keys:
        if key in study.methods:
            menu = _priced_menu(prepared, study, [key], "whole")
            yield from _uniform(prepared, study, menu, Uniform(key, "all"), f"{key} everywhere")


def _spt(prepared: Prepared, study: Study) -> Iterable[Candidate]:
    if "lora" not in study.methods:
        return
    scores = spt_scores(prepared.scores)
    fused: Fused = "slices"
    sites = {site.name: site for site in prepared.catalog.candidates(fused)}
    menu = Menu((), sites, scores)
    for rank in _SPT_RANKS:
        spt = SPT(methods=study.methods, rank=rank)
        yield from _try(f"spt (lora r{rank})", partial(spt.allocate, menu, prepared.budget, study.seed))


def _random_mixes(prepared: Prepared, study: Study) -> Iterable[Candidate]:
    menu = make_menu(prepared, study)

    def mix(draw: int) -> Allocation:
        allocation = RandomMix().allocate(menu, prepared.budget, study.seed + draw)
        return attach_indices(allocation, study.methods, prepared.scores, menu.sites)

    for draw in range(_RANDOM_DRAWS):
        yield from _try(f"random mix {draw + 1}", partial(mix, draw))
