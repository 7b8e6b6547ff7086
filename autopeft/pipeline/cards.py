"""What is known about every registered method, for listings: read off the plug-ins themselves."""

from __future__ import annotations

import inspect
import re
import typing
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import timm
import torch

from autopeft.config.registries import METHODS
from autopeft.config.study import DEFAULT_METHODS
from autopeft.core.contracts import GroupMethod, Method
from autopeft.core.places import places_of
from autopeft.core.site import Catalog, Site
from autopeft.methods.base import Adapter
from autopeft.models.scan import scan

__all__ = ["MethodCard", "method_cards", "method_table"]

_REFERENCES = {"vit": "vit_base_patch16_224", "convnet": "efficientnet_lite0"}
"""Models that methods are tried on: one of attention, one of convolutions, plain and depthwise."""

_ARXIV = re.compile(r"arXiv[: ](\d{4}\.\d{4,5})")


@dataclass(frozen=True, slots=True)
class MethodCard:
    """One method at its default settings.

    Attributes:
        name: what a study calls it.
        title: what it is, in a sentence.
        family: which learning rate it takes.
        slots: what it changes of a site.
        kinds: kinds of sites it goes on, in ViT-B/16 and EfficientNet-Lite0.
        count: its price, as the method states it.
        smallest: trained scalars of its smallest size wherever it fits in ViT-B/16; 0 where it fits nowhere.
        mergeable: `yes`, `no`, or `some` of those sites.
        exports: formats that can hold it.
        source: arXiv number of the paper; empty where there is none.
        default: whether a study that names no methods offers it.
    """

    name: str
    title: str
    family: str
    slots: tuple[str, ...]
    kinds: tuple[str, ...]
    count: str
    smallest: int
    mergeable: str
    exports: tuple[str, ...]
    source: str
    default: bool


def method_cards(names: Iterable[str] | None = None) -> tuple[MethodCard, ...]:
    """Cards of all registered methods, other packages' included, by name.

    Args:
        names: only these.

    Raises:
        UnknownPlugin: for a name that is not registered.
    """
    offered = {str(preset.get("type", key)) for key, preset in DEFAULT_METHODS.items()}
    return tuple(_card(name, METHODS[name], name in offered) for name in sorted(METHODS if names is None else names))


def method_table(cards: Iterable[MethodCard]) -> str:
    """The cards as a Markdown table."""
    rows = [
        "| method | what it trains | changes | count per site | merges | exports | source |",
        "|---|---|---|---|---|---|---|",
    ]
    for card in cards:
        source = f"[{card.source}](https://arxiv.org/abs/{card.source})" if card.source else ""
        name = f"**`{card.name}`**" if card.default else f"`{card.name}`"
        cells = (name, card.title, ", ".join(card.slots), card.count, card.mergeable, ", ".join(card.exports), source)
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


@cache
def _catalog(name: str) -> Catalog:
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return scan(timm.create_model(name))


def _card(name: str, cls: type[Method], default: bool) -> MethodCard:
    module = inspect.getmodule(cls)
    title = _titled(_sentence(inspect.getdoc(module) if module is not None else ""))
    text = " ".join(filter(None, (inspect.getdoc(cls), inspect.getdoc(module) if module is not None else "")))
    source = _ARXIV.search(text)
    try:
        method = cls()
    except TypeError:
        # It has settings without a default: nothing can be tried before somebody chooses them.
        family = str(getattr(cls, "family", ""))
        return MethodCard(name, title, family, (), (), _sentence(inspect.getdoc(cls.cost)), 0, "", (), "", default)
    sites = {key: _usable(method, _catalog(model)) for key, model in _REFERENCES.items()}
    found = [site for members in sites.values() for site in members]
    merges = {method.mergeable(site) for site in found}
    mergeable = "" if not merges else "yes" if merges == {True} else "no" if merges == {False} else "some"
    low_rank = _adapter_class(cls).low_rank is not Adapter.low_rank
    exports = (*(("timm", "delta") if True in merges else ()), *(("peft",) if low_rank else ()), "native")
    return MethodCard(
        name=name,
        title=title,
        family=method.family,
        slots=tuple(dict.fromkeys(slot for site in found for slot in _slots(method, site))),
        kinds=tuple(dict.fromkeys(site.kind for site in found)),
        count=_sentence(inspect.getdoc(cls.cost)),
        smallest=_smallest(method, sites["vit"]),
        mergeable=mergeable,
        exports=exports,
        source=source[1] if source else "",
        default=default,
    )


def _usable(method: Method, catalog: Catalog) -> list[Site]:
    return [site for site in catalog.offered("whole") if places_of(catalog, method, site) and method.sizes(site)]


def _slots(method: Method, site: Site) -> tuple[str, ...]:
    if site.kind == "group" and isinstance(method, GroupMethod):
        return tuple(dict.fromkeys(slot for _, slots in method.parts(site) for slot in slots))
    return method.slots(site)


def _smallest(method: Method, sites: list[Site]) -> int:
    """Sum of the smallest sizes; of groups, of the widest one alone, since groups overlap."""
    groups = [site for site in sites if site.kind == "group"]
    if groups:
        ways: dict[str, list[Site]] = {}
        for site in groups:
            ways.setdefault(site.name.partition(":")[0] + ":" * (":" in site.name), []).append(site)
        sites = max((ways[key] for key in sorted(ways)), key=lambda way: sum(len(s.members) for s in way))
    return sum(method.cost(site, method.sizes(site)[0]).trainable for site in sites)


def _adapter_class(cls: type[Method]) -> type[Adapter]:
    """What `build` says it returns, so that nothing has to be built."""
    found = typing.get_type_hints(cls.build).get("return")
    return found if isinstance(found, type) and issubclass(found, Adapter) else Adapter


def _titled(text: str) -> str:
    """What a module says it holds, without the name in front of the colon, beginning in upper case."""
    rest = text.partition(": ")[2] or text
    return rest[:1].upper() + rest[1:]


def _sentence(text: str | None) -> str:
    """The first sentence or clause, without its full stop, on one line."""
    line = " ".join((text or "").split("\n\n")[0].split())
    return re.split(r"; |\. ", line)[0].rstrip(".")
