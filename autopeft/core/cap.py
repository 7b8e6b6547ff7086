"""A limit on something that a plan uses up besides its budget."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from autopeft.core.menu import Option
from autopeft.errors import UsageError

__all__ = ["Cap", "Term"]


@dataclass(frozen=True, slots=True)
class Term:
    """An amount that several options use together, and once.

    Attributes:
        amount: how much; at least 0.
        after: position of an earlier term that brings this one with it, -1 for none.
    """

    amount: float
    after: int = -1


@dataclass(frozen=True, slots=True, eq=False)
class Cap:
    """FLOPs of a training step, bytes kept for its backward pass, the rank of a layer: a second price with a limit.

    A plan uses `fixed`, what each of its options uses alone, and every term that one of its options switches on, once.
    The gradient's way is such a chain of terms: whoever trains in block 3 pays for the backward pass of blocks 3 to 11,
    however many others do so too. An option may use more where a term is on: what it costs to pass a gradient on to its
    own input, when somebody in front asks for one.

    Attributes:
        name: what is limited, as a person reads it.
        most: the limit.
        fixed: what is used without any option.
        own: `(site, method, size)` of an option to what it uses alone; nothing where it is not listed.
        terms: amounts that are shared; a term comes after the one that it names.
        triggers: `(site, method, size)` to the positions of the terms that the option switches on.
        extra: `(site, method, size)` to pairs of a term's position and what the option uses besides while it is on.

    Raises:
        UsageError: when nothing at all uses more than the limit.
        ValueError: for a negative amount, or a term that comes before the one that brings it.
    """

    name: str
    most: float
    fixed: float = 0.0
    own: Mapping[tuple[str, str, int], float] = field(default_factory=dict)
    terms: tuple[Term, ...] = ()
    triggers: Mapping[tuple[str, str, int], tuple[int, ...]] = field(default_factory=dict)
    extra: Mapping[tuple[str, str, int], tuple[tuple[int, float], ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.most >= self.fixed:
            raise UsageError(
                f"{self.name}: the limit of {self.most:,.6g} is less than the {self.fixed:,.6g} that are used without "
                f"any adapter; raise it to more than that"
            )
        besides = [amount for pairs in self.extra.values() for _, amount in pairs]
        amounts = [self.fixed, *self.own.values(), *besides, *(t.amount for t in self.terms)]
        if not all(math.isfinite(a) and a >= 0 for a in amounts):
            raise ValueError(f"amounts of {self.name} must be finite and at least 0, got {min(amounts)}")
        if any(t.after >= i for i, t in enumerate(self.terms)):
            raise ValueError(f"a term of {self.name} comes before the term that brings it")

    def used(self, options: Iterable[Option]) -> float:
        """What a plan of these options uses."""
        chosen = [o.ident for o in options]
        on = {i for ident in chosen for i in self.triggers.get(ident, ())}
        shared = []
        for i, term in enumerate(self.terms):
            if i in on or term.after in on:
                on.add(i)
                shared.append(term.amount)
        besides = [amount for ident in chosen for i, amount in self.extra.get(ident, ()) if i in on]
        return math.fsum([self.fixed, *(self.own.get(ident, 0.0) for ident in chosen), *besides, *shared])
