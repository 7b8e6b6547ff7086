"""A genetic algorithm for fronts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from autopeft.errors import UsageError

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler
    from optuna.study import StudyDirection
    from optuna.trial import FrozenTrial

__all__ = ["NSGA2"]

_GENERATION = "NSGAIISampler:generation"
"""Where Optuna's sampler keeps the generation of a trial."""


@dataclass(frozen=True, slots=True)
class NSGA2:
    """NSGA-II (Deb et al., 2002): ranks of domination, then crowding, then uniform crossover and mutation.

    For fronts of three goals, such as accuracy, parameters and latency. Looks at trials that ran to their end only, so
    nothing is stopped early. Generations are counted off the order of the trials, which makes them a function of the
    history: the first `population` searched trials, drawn at random, and the baselines are the first generation, the
    next `population` searched trials the second, and so on.

    Attributes:
        population: trials per generation. Small, because a search has tens of trials, not thousands.

    Raises:
        UsageError: for less than two.
    """

    population: int = 12

    prunes: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.population < 2:
            raise UsageError(f"population of the sampler nsga2 must be at least 2, got {self.population}")

    def make(self, seed: int) -> BaseSampler:
        """A fresh sampler; its memory is the generation written on each trial."""
        from optuna.samplers import NSGAIISampler

        return NSGAIISampler(population_size=self.population, seed=seed)

    def view(self, trials: Sequence[FrozenTrial], directions: Sequence[StudyDirection]) -> list[FrozenTrial]:
        """The finished trials with their generation; those without a value have the worst one."""
        from optuna.trial import TrialState, create_trial

        from autopeft.search._bad import worst
        from autopeft.search.history import role_of

        finished = [t for t in trials if t.state.is_finished()]
        places: list[int | None] = []
        searched = 0
        for t in finished:
            places.append(searched // self.population if role_of(t) == "trial" else None)
            searched += role_of(t) == "trial"
        if not any(t.state == TrialState.COMPLETE for t in finished):
            return []
        return [
            create_trial(
                params=t.params,
                distributions=t.distributions,
                values=t.values,
                system_attrs={**t.system_attrs, _GENERATION: place or 0},
            )
            for place, t in zip(places, worst(finished, directions), strict=True)
            # Baselines join the first generation once it is full: before, they would stand in for random draws.
            if place is not None or searched >= self.population
        ]
