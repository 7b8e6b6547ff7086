"""Where trainable parameters can go: places, sites and the catalogue of a model."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from autopeft.errors import UsageError

__all__ = ["Catalog", "Fused", "Kind", "Place", "Site", "Slot"]

Kind = Literal["linear", "conv2d", "layer_norm", "batch_norm", "layer_scale", "tokens", "block", "residual", "group"]
"""What the host module is. `tokens` is a parameter held by a module directly (class token, position embedding);
`block` is a residual block seen from outside, `residual` one of its branches (attention, MLP); `group` is a set of
sites that one option changes together."""

Slot = Literal["weight", "bias", "output", "tokens"]
"""What of the site an option changes."""

Fused = Literal["whole", "slices", "both"]
"""Whether a fused projection (qkv) is offered as one site, as its row slices, or as both."""

_SLOT_ORDER: tuple[str, ...] = get_args(Slot)


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """One slot of one site. Two options that share a place exclude each other."""

    site: str
    slot: Slot

    def __str__(self) -> str:
        return f"{self.site}:{self.slot}"


@dataclass(frozen=True, slots=True)
class Site:
    """One spot of the model that adapters can be put on.

    Attributes:
        name: unique name: the module's dotted path; a row slice of a fused projection appends `[q]`; a parameter
            held by a module directly is called by its own dotted path.
        module: dotted path of the host module; the empty string is the model itself.
        kind: what the host is.
        shape: shape of the weight as stored, of the slice's rows for a slice; `(channels,)` for a block.
        has_bias: whether the host has a bias (of `shape[0]` entries).
        depth: index of the residual block the site lies in, from 0; the stem counts as the first block, everything
            after the last block as the last.
        role: what the site does, such as `attn.qkv`, `attn.q`, `attn.proj`, `mlp.fc1`, `norm`, `conv`, `stem`.
        slots: the slots that work here. Empty when the host's forward is never called. `tokens` of a block means
            tokens put beside its own while it runs.
        rows: `(start, stop)` rows of the host's weight, for a slice of a fused projection.
        parts: names of the slices of a fused projection, on the whole.
        parent: name of the whole, on a slice.
        parameter: name of the tensor inside the host that slot `weight` (or `tokens`) means.
        groups: groups of a convolution.
        channel_axis: axis of the host's output that the rows of the weight index.
        entry: on a residual branch, dotted path of the norm in front of it: its input is the residual stream as it is.
        members: the sites of a group, in model order.
    """

    name: str
    module: str
    kind: Kind
    shape: tuple[int, ...]
    has_bias: bool
    depth: int
    role: str
    slots: tuple[Slot, ...]
    rows: tuple[int, int] | None = None
    parts: tuple[str, ...] = ()
    parent: str = ""
    parameter: str = "weight"
    groups: int = 1
    channel_axis: int = -1
    entry: str = ""
    members: tuple[Site, ...] = ()

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("a site needs a name, got an empty string")
        if not self.shape or any(d < 1 for d in self.shape):
            raise ValueError(f"every dimension of a site must be at least 1, {self.name} has shape {self.shape}")
        if self.kind not in get_args(Kind):
            raise ValueError(f"unknown kind {self.kind!r} of site {self.name}; known: {', '.join(get_args(Kind))}")
        if self.depth < 0:
            raise ValueError(f"depth must be at least 0, {self.name} has {self.depth}")
        unknown = set(self.slots) - set(_SLOT_ORDER)
        if unknown or len(set(self.slots)) != len(self.slots):
            raise ValueError(f"slots of {self.name} must be distinct and among {_SLOT_ORDER}, got {self.slots}")
        if self.rows is not None and self.rows[1] - self.rows[0] != self.shape[0]:
            raise ValueError(f"rows {self.rows} of {self.name} do not match its shape {self.shape}")
        if (self.kind == "group") != bool(self.members):
            raise ValueError(f"a group has members and nothing else has, {self.name} ({self.kind}) has {self.members}")
        if self.groups < 1:
            raise ValueError(f"groups must be at least 1, {self.name} has {self.groups}")

    @property
    def out_features(self) -> int:
        """Rows of the weight: output features of a Linear, output channels of a convolution, channels of a norm."""
        return self.shape[0]

    @property
    def in_features(self) -> int:
        """Columns of the weight flattened to a matrix: inputs of a Linear, `in/groups * kh * kw` of a convolution."""
        return math.prod(self.shape[1:])

    @property
    def n_weight(self) -> int:
        """Entries of the weight."""
        return math.prod(self.shape)

    @property
    def n_bias(self) -> int:
        """Entries of the bias, 0 without one."""
        return self.shape[0] if self.has_bias else 0

    @property
    def is_matrix(self) -> bool:
        """Whether the weight is a matrix once flattened (Linear or convolution)."""
        return self.kind in ("linear", "conv2d")


@dataclass(frozen=True, slots=True)
class Catalog:
    """All sites of a model in model order.

    Attributes:
        sites: every site; a fused projection is listed as the whole followed by its slices.
        head: dotted paths of the classifier modules, trained in full and outside the budget.
        n_base: unique base parameters without the classifier: what a budget is a share of.
        n_head: parameters of the classifier.
        n_depth: number of residual blocks (depths run from 0 to `n_depth - 1`).
        architecture: class name of the model, for messages.
    """

    sites: tuple[Site, ...]
    head: tuple[str, ...]
    n_base: int
    n_head: int
    n_depth: int
    architecture: str = ""

    SCHEMA: ClassVar[str] = "autopeft.catalog/1"

    def __post_init__(self) -> None:
        names = [site.name for site in self.sites]
        if len(set(names)) != len(names):
            twice = sorted({n for n in names if names.count(n) > 1})
            raise ValueError(f"site names must be unique, listed more than once: {', '.join(twice)}")
        if self.n_base < 0 or self.n_head < 0 or self.n_depth < 1:
            raise ValueError(f"bad totals: n_base={self.n_base}, n_head={self.n_head}, n_depth={self.n_depth}")
        known = set(names)
        for site in self.sites:
            if site.depth >= self.n_depth:
                raise ValueError(f"{site.name} has depth {site.depth}, but the catalogue has {self.n_depth} blocks")
            missing = [p for p in (*site.parts, *filter(None, [site.parent])) if p not in known]
            if missing:
                raise ValueError(f"{site.name} refers to unlisted sites: {', '.join(missing)}")

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def __getitem__(self, name: str) -> Site:
        for site in (*self.sites, *self.groups()):
            if site.name == name:
                return site
        raise UsageError(f"the model has no site called {name!r}; `autopeft inspect MODEL` lists the sites")

    def __contains__(self, name: object) -> bool:
        return any(site.name == name for site in self.sites)

    @property
    def fingerprint(self) -> str:
        """12 hexadecimal digits; equal exactly when the structure is equal.

        Residual branches, and whether a block takes further tokens, follow from the rest.
        """
        rows = [
            [s.name, s.module, s.kind, s.shape, s.has_bias, s.depth, s.role, _own(s), s.rows, s.parameter, s.groups]
            for s in self.sites
            if s.kind != "residual"
        ]
        text = json.dumps([rows, self.head, self.n_base, self.n_head, self.n_depth], separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def places(self, site: Site, slots: Iterable[Slot]) -> tuple[Place, ...]:
        """The places that an option on these slots of this site occupies.

        The whole of a fused projection occupies the places of its slices, so that an option on the whole and an
        option on a slice exclude each other.
        """
        names = site.parts or (site.name,)
        return tuple(Place(name, slot) for name in names for slot in slots)

    def candidates(self, fused: Fused = "whole") -> tuple[Site, ...]:
        """The sites offered to methods, in model order, with fused projections whole, sliced, or both."""
        if fused == "both":
            return self.sites
        if fused == "whole":
            return tuple(s for s in self.sites if not s.parent)
        return tuple(s for s in self.sites if not s.parts)

    def offered(self, fused: Fused = "whole") -> tuple[Site, ...]:
        """What menus are made of: `candidates`, then the groups."""
        return (*self.candidates(fused), *self.groups())

    def groups(self) -> tuple[Site, ...]:
        """Sets of sites that one option may change together; derived, so they are no part of `sites`.

        `*` holds every Linear and convolution (fused ones whole), `*:ROLE` those of one role where there are several,
        `block:K` every site of block K, `blocks` the residual blocks, `stream` the first and the last of them.
        """
        whole = [s for s in self.sites if not s.parent and s.slots]
        matrices = [s for s in whole if s.is_matrix]
        blocks = [s for s in whole if s.kind == "block"]
        found: dict[str, list[Site]] = {"*": matrices}
        for site in matrices:
            found.setdefault(f"*:{site.role}", []).append(site)
        inside = [b.name + "." for b in blocks]
        for site in whole:
            if site.kind != "block" and site.name.startswith(tuple(inside)):
                found.setdefault(f"block:{site.depth}", []).append(site)
        found["blocks"] = blocks
        found["stream"] = [blocks[0], blocks[-1]] if len(blocks) > 1 else []
        return tuple(
            Site(
                name=name,
                module="",
                kind="group",
                shape=(len(members),),
                has_bias=False,
                depth=max(m.depth for m in members) if name.startswith("block:") else self.n_depth // 2,
                role="group",
                slots=(),
                members=tuple(members),
            )
            for name, members in found.items()
            if len(members) > 1
        )


def _own(site: Site) -> tuple[Slot, ...]:
    return tuple(slot for slot in site.slots if site.kind != "block" or slot != "tokens")
