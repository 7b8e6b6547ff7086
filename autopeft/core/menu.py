"""Options with prices: what a solver chooses from."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from autopeft.core.bases import Bases
from autopeft.core.budget import Cost
from autopeft.core.site import Place, Site

if TYPE_CHECKING:
    from autopeft.core.cap import Cap
    from autopeft.core.scores import Scores

__all__ = ["Indices", "Menu", "Option"]


@dataclass(frozen=True, slots=True, eq=False)
class Indices:
    """Which entries of a tensor a sparse option changes.

    Attributes:
        values: strictly increasing flat positions in the site's tensor (its rows, for a slice): a numpy int64 array
            of shape (n,).
        extra: what else was chosen with them, such as an order of the rows: name to int64 array of one dimension.
    """

    values: Any
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, array in self.extra.items():
            if array.ndim != 1 or array.dtype.kind != "i" or array.dtype.itemsize != 8:
                raise ValueError(f"{name} of indices must be a 1-D int64 array, got {array.dtype} of {array.shape}")
            array.setflags(write=False)
        v = self.values
        if v.ndim != 1 or v.dtype.kind != "i" or v.dtype.itemsize != 8:
            raise ValueError(f"indices must be a 1-D int64 array, got {v.dtype} of shape {tuple(v.shape)}")
        if len(v) and (v[0] < 0 or bool((v[1:] <= v[:-1]).any())):
            raise ValueError("indices must be strictly increasing and not negative")
        v.setflags(write=False)

    def __len__(self) -> int:
        return len(self.values)

    @property
    def sha256(self) -> str:
        """Digest of the positions, and of what was chosen with them, as little-endian int64."""
        digest = hashlib.sha256(self.values.astype("<i8").tobytes())
        for name in sorted(self.extra):
            digest.update(name.encode() + self.extra[name].astype("<i8").tobytes())
        return digest.hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Indices) and self.sha256 == other.sha256

    def __hash__(self) -> int:
        return hash(self.sha256)


@dataclass(frozen=True, slots=True)
class Option:
    """One method of one size at one site, with its price and predicted gain.

    Attributes:
        site: name of the site.
        method: key of the method in the study (two keys may hold one method with different settings).
        size: the method's own size: rank, core side, number of entries, bottleneck width; 1 where there is none.
        cost: exact price; at least one trainable scalar.
        gain: predicted decrease of the validation loss; comparable between all options of one menu. Where memorisation
            has a price, less that price.
        places: the places it occupies, sorted.
        indices: which entries, for sparse options once they are chosen.
        bases: between which frozen matrices, for options whose bases come from data, once they are chosen.
        memory: predicted change of memorisation, below 0 where it is less; None where it has no price.
    """

    site: str
    method: str
    size: int
    cost: Cost
    gain: float
    places: tuple[Place, ...]
    indices: Indices | None = None
    bases: Bases | None = None
    memory: float | None = None

    def __post_init__(self) -> None:
        if self.cost.trainable < 1:
            raise ValueError(f"option {self.key} must cost at least 1 trainable parameter, got {self.cost.trainable}")
        if self.size < 1:
            raise ValueError(f"option {self.key} must have a size of at least 1, got {self.size}")
        if not math.isfinite(self.gain):
            raise ValueError(f"the gain of option {self.key} must be finite, got {self.gain}")
        if self.memory is not None and not math.isfinite(self.memory):
            raise ValueError(f"the memory of option {self.key} must be finite, got {self.memory}")
        if not self.places:
            raise ValueError(f"option {self.key} occupies no place")
        if tuple(sorted(set(self.places))) != self.places:
            raise ValueError(f"places of option {self.key} must be sorted and distinct, got {self.places}")
        if self.indices is not None and len(self.indices) != self.size:
            raise ValueError(f"option {self.key} has size {self.size} but {len(self.indices)} indices")

    @property
    def key(self) -> str:
        """`site/method`: unique within an allocation."""
        return f"{self.site}/{self.method}"

    @property
    def ident(self) -> tuple[str, str, int]:
        """Site, method and size: unique within a menu."""
        return self.site, self.method, self.size

    @property
    def order(self) -> tuple[tuple[Place, ...], str, str, int, int]:
        """A total order that depends on nothing but the option, so that ties break alike everywhere."""
        return (self.places, self.site, self.method, self.size, self.cost.trainable)


@dataclass(frozen=True, slots=True)
class Menu:
    """All options of a model, and what they were made from.

    Attributes:
        options: the options in canonical order, whatever order they were given in.
        sites: the sites they refer to, by name.
        scores: the scores behind the gains; allocators that threshold entries (SPT) need them.
        caps: limits on what a plan uses up besides its budget.
    """

    options: tuple[Option, ...]
    sites: Mapping[str, Site] = field(default_factory=dict)
    scores: Scores | None = None
    caps: tuple[Cap, ...] = ()

    def __post_init__(self) -> None:
        ordered = tuple(sorted(self.options, key=lambda o: o.order))
        object.__setattr__(self, "options", ordered)
        seen: set[tuple[str, str, int]] = set()
        for o in ordered:
            if o.ident in seen:
                raise ValueError(f"option {o.key} of size {o.size} is on the menu twice")
            seen.add(o.ident)

    def __iter__(self) -> Iterator[Option]:
        return iter(self.options)

    def __len__(self) -> int:
        return len(self.options)

    def only(self, methods: Iterable[str]) -> Menu:
        """The same menu with the options of these methods alone."""
        wanted = set(methods)
        return Menu(tuple(o for o in self.options if o.method in wanted), self.sites, self.scores, self.caps)
