"""Plans that must leave in one format: which options it can hold, and how large they may be."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from autopeft.allocation.knapsack import Knapsack
from autopeft.backends.native import Native
from autopeft.config.limits import LimitSettings
from autopeft.core.allocation import Allocation
from autopeft.core.cap import Cap
from autopeft.core.menu import Menu, Option
from autopeft.errors import InfeasibleBudget
from autopeft.export.folder import LORA, Folder
from autopeft.pipeline.built import alike, built
from autopeft.pipeline.prices import every_option
from autopeft.pipeline.usage import step_usage
from autopeft.training.threads import thread_count

if TYPE_CHECKING:
    from torch import Tensor, nn

    from autopeft.config.study import Study
    from autopeft.core.contracts import Method
    from autopeft.pipeline.prepare import Prepared

__all__ = ["is_constrained", "limited_menus"]


def is_constrained(study: Study) -> bool:
    """Whether plans of the exact packing are held to more than the budget."""
    return isinstance(study.allocator, Knapsack) and not (study.allocator.plain and study.limits == LimitSettings())


def limited_menus(prepared: Prepared, study: Study, menu: Menu) -> tuple[Menu, ...]:
    """The menu with the study's caps and what its target can hold; a menu for each kind of folder that it could be.

    What a PEFT folder holds is asked of what the options build, by the code that writes the folder.

    Args:
        prepared: the model.
        study: its `limits` name the target and the largest rank.
        menu: all options.

    Raises:
        InfeasibleBudget: when the target can hold nothing that is on the menu.
    """
    limits = study.limits
    if limits.max_flops is not None or limits.max_memory is not None:
        menu = dataclasses.replace(menu, caps=(*menu.caps, *_caps(prepared, study)))
    if limits.target == "timm":
        menu = _part(menu, [o for o in menu if study.methods[o.method].mergeable(menu.sites[o.site])])
    kinds: list[str | None] = [None]
    folders: dict[tuple[str, str, int], Folder] = {}
    if limits.target in ("peft", "lora") or limits.max_rank is not None:
        folders = _folders(prepared, menu, study.methods)
    if limits.target in ("peft", "lora"):
        every = {kind for f in folders.values() for kind in f.kinds}
        kinds = [kind for kind in sorted(every) if limits.target == "peft" or kind == LORA]
    found = [_of_kind(menu, folders, kind, limits.max_rank) for kind in kinds]
    found = [m for m in found if len(m)]
    if not found:
        rank = "" if limits.max_rank is None else f" with limits.max_rank {limits.max_rank}"
        raise InfeasibleBudget(
            f"none of the methods {', '.join(study.methods)} has an option that a budget of {prepared.budget} buys "
            f"and that can leave as {limits.target!r}{rank}; add a method that can (`autopeft methods` lists them), or "
            f"set another limits.target"
        )
    return tuple(found)


def _of_kind(menu: Menu, folders: Mapping[tuple[str, str, int], Folder], kind: str | None, most: int | None) -> Menu:
    """The options that one kind of folder holds (None: all), each within the largest rank; caps where ranks add up."""
    if not folders:
        return menu
    kept = [
        o
        for o in menu
        if (kind is None or kind in folders[o.ident].kinds)
        and (most is None or max(folders[o.ident].ranks.values(), default=0) <= most)
    ]
    if most is None:
        return _part(menu, kept)
    own: dict[str, dict[tuple[str, str, int], float]] = {}
    places: dict[str, set[Any]] = {}
    for o in kept:
        for module, rank in folders[o.ident].ranks.items():
            own.setdefault(module, {})[o.ident] = float(rank)
            places.setdefault(module, set()).add(o.places)
    caps = tuple(
        Cap(f"rank on {module}", float(most), own=ranks) for module, ranks in own.items() if len(places[module]) > 1
    )
    part = _part(menu, kept)
    return dataclasses.replace(part, caps=(*part.caps, *caps))


def _part(menu: Menu, options: Iterable[Option]) -> Menu:
    return Menu(tuple(options), menu.sites, menu.scores, menu.caps)


def _folders(prepared: Prepared, menu: Menu, methods: Mapping[str, Method]) -> dict[tuple[str, str, int], Folder]:
    """The folders of every option."""
    model, known = prepared.model, prepared.folders
    found = {}
    # By increasing size: what no folder holds at its smallest, none holds at all.
    for o in sorted(menu, key=lambda o: o.size):
        site = menu.sites[o.site]
        kind = alike(model, methods[o.method], site)
        if kind in known:
            found[o.ident] = Folder()
            continue
        if (*kind, o.size) not in known:
            folder = Folder.of(built(model, methods[o.method], site, o), model)
            known[(*kind, o.size)] = folder
            if not folder.kinds:
                known[kind] = folder
        folder = known[(*kind, o.size)]
        if folder.ranks and not site.members:
            # Found on a site that is like this one.
            folder = Folder(folder.kinds, dict.fromkeys([site.module], sum(folder.ranks.values())))
        found[o.ident] = folder
    return found


def _caps(prepared: Prepared, study: Study) -> list[Cap]:
    """The study's caps on FLOPs and bytes of a step, from a model of what options use that is made once."""
    key = (repr(sorted(study.methods.items())), study.fused, study.mergeable, study.data.batch_size)
    if key not in prepared.usage:
        everything = every_option(prepared, study)

        def loss(model: nn.Module, n: int) -> Tensor:
            return prepared.task.loss(model, next(iter(prepared.task.batches("inner", batch_size=n))))

        with (
            thread_count(prepared.threads),
            Native().insert(
                prepared.model, prepared.catalog, Allocation((), prepared.budget), {}, head=prepared.head
            ) as inserted,
        ):
            inserted.train_mode(True)
            prepared.usage[key] = step_usage(
                inserted.model,
                prepared.catalog,
                study.methods,
                everything,
                lambda n: loss(inserted.model, n),
                study.data.batch_size,
            )
    flops, memory = prepared.usage[key]
    limits = ((flops, study.limits.flops), (memory, study.limits.memory))
    return [dataclasses.replace(cap, most=most) for cap, most in limits if most is not None]
