"""A plan: the chosen options. One that costs more than its budget cannot be built."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from autopeft.core.budget import Budget, Cost
from autopeft.core.menu import Option
from autopeft.core.site import Place
from autopeft.errors import InfeasibleBudget, UsageError

__all__ = ["Allocation", "Provenance"]


@dataclass(frozen=True, slots=True)
class Provenance:
    """Who made an allocation, and how good it is known to be.

    Attributes:
        allocator: name of the allocator with its settings.
        scorer: name of the scorer with its settings, empty when none was used.
        bound: proven upper bound of the total gain, None when the allocator proves nothing.
        price: dual price: predicted gain per further unit of budget, None when unknown.
        seconds: time the solver took.
        value: what was maximised, when that is not the sum of the gains; the bound is then of this.
    """

    allocator: str = ""
    scorer: str = ""
    bound: float | None = None
    price: float | None = None
    seconds: float = 0.0
    value: float | None = None


@dataclass(frozen=True, slots=True)
class Allocation:
    """Chosen options within a budget.

    Attributes:
        options: the options in canonical order; no two share a place.
        budget: the limit they were bought under.
        provenance: not part of equality.

    Raises:
        InfeasibleBudget: when the options cost more than the budget.
        UsageError: when two options share a place.
    """

    options: tuple[Option, ...]
    budget: Budget
    provenance: Provenance = Provenance()

    SCHEMA: ClassVar[str] = "autopeft.allocation/1"

    def __post_init__(self) -> None:
        ordered = tuple(sorted(self.options, key=lambda o: o.order))
        object.__setattr__(self, "options", ordered)
        taken: dict[Place, Option] = {}
        for option in ordered:
            for place in option.places:
                if place in taken:
                    raise UsageError(f"{option.key} and {taken[place].key} both occupy {place}; keep one of them")
                taken[place] = option
        if self.spent > self.budget.limit:
            raise InfeasibleBudget(
                f"the plan costs {self.spent:,} {self.budget.unit}, more than the budget of {self.budget}"
            )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Allocation) and (self.options, self.budget) == (other.options, other.budget)

    def __hash__(self) -> int:
        return hash((self.options, self.budget))

    def __iter__(self) -> Iterator[Option]:
        return iter(self.options)

    def __len__(self) -> int:
        return len(self.options)

    @property
    def cost(self) -> Cost:
        """Sum of the options' costs."""
        total = Cost.zero()
        for option in self.options:
            total = total + option.cost
        return total

    @property
    def spent(self) -> int:
        """The cost in the budget's unit."""
        return sum(option.cost.of(self.budget.unit) for option in self.options)

    @property
    def trainable(self) -> int:
        """Trainable scalars, head not counted."""
        return sum(option.cost.trainable for option in self.options)

    @property
    def gain(self) -> float:
        """Sum of the predicted gains."""
        return sum(option.gain for option in self.options)

    @property
    def memory(self) -> float | None:
        """Sum of the predicted changes of memorisation; None where no option has one."""
        known = [option.memory for option in self.options if option.memory is not None]
        return sum(known) if known else None

    @property
    def worth(self) -> float:
        """What was maximised: the gain, unless the provenance says otherwise."""
        return self.gain if self.provenance.value is None else self.provenance.value

    @property
    def gap(self) -> float | None:
        """Relative distance between what was maximised and its proven bound; None without a bound, 0 when optimal."""
        bound = self.provenance.bound
        if bound is None:
            return None
        return max(0.0, bound - self.worth) / abs(bound) if bound else 0.0

    @property
    def digest(self) -> str:
        """16 hexadecimal digits; equal for plans that build the same adapters, whatever gains they were given."""
        rows = [_identity(option) for option in self.options]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def _identity(option: Option) -> list[str | int | None]:
    """What decides what an option builds."""
    chosen = None if option.indices is None else option.indices.sha256
    rows: list[str | int | None] = [option.site, option.method, option.size, option.cost.trainable, chosen]
    return rows if option.bases is None else [*rows, option.bases.sha256]
