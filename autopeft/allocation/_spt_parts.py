"""What SPT buys with: whole modules, whole vectors, chosen entries and the class token, as options of the methods."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from autopeft.core.menu import Indices, Option
from autopeft.core.site import Place, Site, Slot
from autopeft.errors import UsageError

if TYPE_CHECKING:
    from autopeft.core.contracts import Method

__all__ = ["ENTRIES", "TOKENS", "VECTORS", "class_token", "default_methods", "key_for", "make_option"]

VECTORS = ("vector", "bias")
"""Method keys that may train a whole vector: a norm's weight, any bias."""

ENTRIES = ("sparse", "sparse_bias")
"""Method keys that may train chosen entries."""

TOKENS = "tokens"
"""Method key that trains the class token."""


def default_methods() -> dict[str, Method]:
    """The methods that SPT buys with, with their defaults, under the keys of a default study."""
    from autopeft.methods.bias import Bias
    from autopeft.methods.bottleneck import BottleneckAdapter
    from autopeft.methods.lora import LoRA
    from autopeft.methods.sparse import Sparse
    from autopeft.methods.tokens import Tokens
    from autopeft.methods.vector import Vector

    return {
        "lora": LoRA(),
        "adapter": BottleneckAdapter(),
        "sparse": Sparse(slot="weight"),
        "sparse_bias": Sparse(slot="bias"),
        "bias": Bias(),
        "vector": Vector(),
        "tokens": Tokens(),
    }


def key_for(methods: Mapping[str, Method], keys: Iterable[str], site: Site, slot: Slot) -> str | None:
    """The first of these methods that the study has and that changes this slot of this site and nothing else."""
    return next((key for key in keys if key in methods and methods[key].slots(site) == (slot,)), None)


def class_token(sites: Iterable[Site]) -> Site | None:
    """The class token, where the model has one."""
    return next((s for s in sites if s.kind == "tokens" and s.name.rpartition(".")[2] == "cls_token"), None)


def make_option(
    methods: Mapping[str, Method], key: str, site: Site, size: int, gain: float = 0.0, entries: Any = None
) -> Option:
    """One option with the method's own price.

    Args:
        methods: method key to method.
        key: the method.
        site: where.
        size: the method's size; the number of entries for sparse methods.
        gain: what to write as predicted gain.
        entries: increasing flat positions, a numpy int64 array; None for methods that choose none.

    Raises:
        UsageError: when the study lacks the method, or it cannot be used at the site.
    """
    if key not in methods:
        raise UsageError(f"SPT needs the method {key!r} at {site.name}, the study has {', '.join(methods) or 'none'}")
    slots = methods[key].slots(site)
    if not slots:
        raise UsageError(f"the method {key!r} cannot be used at {site.name} ({site.kind} of shape {site.shape})")
    places = tuple(sorted(Place(name, slot) for name in site.parts or (site.name,) for slot in slots))
    indices = None if entries is None else Indices(entries)
    return Option(site.name, key, size, methods[key].cost(site, size), gain, places, indices)
