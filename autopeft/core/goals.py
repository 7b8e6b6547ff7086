"""Several goals of one search: which results are allowed, which are on the front, which one is taken."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from autopeft.errors import UnknownKey, UsageError

__all__ = ["Front", "Goals"]

Front = Literal["auto", "first", "epsilon", "pareto"]
"""What is made of several goals: `first` searches for the first and reports the others, `epsilon` searches for the
first among what keeps to the limits on the others, `pareto` searches for the whole front. `auto` is `first` for one
goal, `epsilon` where limits are given, and `pareto` else."""

_DIRECTIONS = ("maximize", "minimize")


@dataclass(frozen=True, slots=True)
class Goals:
    """The goals of a reward, and what is to be made of them.

    Rewards are tuples with one number per goal, in their order.

    Attributes:
        names: what the numbers are called.
        directions: `maximize` or `minimize`, one per name.
        front: what is made of several goals, see `Front`.
        limits: name to the worst value allowed: at most, where the goal is minimised, at least, where it is maximised.

    Raises:
        UnknownKey: for a limit on something that is no goal.
        UsageError: for directions nobody knows, a limit that is no number, or limits that are missing or not used.
    """

    names: tuple[str, ...]
    directions: tuple[str, ...]
    front: Front = "auto"
    limits: Mapping[str, float] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if not self.names or len(self.names) != len(self.directions):
            raise UsageError(f"a reward has {len(self.names)} names and {len(self.directions)} goals; it needs as many")
        for direction in self.directions:
            if direction not in _DIRECTIONS:
                raise UsageError(f"a goal is maximize or minimize, got {direction!r}")
        if self.front not in get_args(Front):
            raise UsageError(f"search.front must be one of {', '.join(get_args(Front))}, got {self.front!r}")
        for name, limit in self.limits.items():
            if name not in self.names:
                raise UnknownKey(f"search.limits has no goal {name!r}; the reward's are {', '.join(self.names)}")
            if not math.isfinite(limit):
                raise UsageError(f"search.limits.{name} must be a finite number, got {limit!r}")
        if self.front == "epsilon" and not self.limits:
            raise UsageError("search.front=epsilon needs a limit on a goal, such as search.limits.NAME=0.5")

    @property
    def mode(self) -> Literal["first", "epsilon", "pareto"]:
        """What `auto` comes to."""
        if self.front != "auto":
            return self.front
        if self.limits:
            return "epsilon"
        return "pareto" if len(self.names) > 1 else "first"

    @property
    def searched(self) -> tuple[str, ...]:
        """Directions of what the sampler is told: of every goal on the way to a front, else of the first alone."""
        return self.directions if self.mode == "pareto" else self.directions[:1]

    def violations(self, rewards: Sequence[float]) -> dict[str, float]:
        """By how much each limit is broken; at most 0 where it is kept. Empty where limits do not steer the search."""
        if self.mode == "first":
            return {}
        found = {}
        for name, direction, value in zip(self.names, self.directions, rewards, strict=True):
            if name in self.limits:
                excess = value - self.limits[name]
                found[name] = excess if direction == "minimize" else -excess
        return found

    def violation(self, rewards: Sequence[float]) -> float:
        """Sum of what the limits are broken by; 0 when all are kept."""
        return sum(max(0.0, v) for v in self.violations(rewards).values())

    def merit(self, rewards: Sequence[float]) -> tuple[float, float]:
        """What results are ordered by, the largest first: keeping to the limits, then the first goal.

        The rule of Deb (2000, "An efficient constraint handling method for genetic algorithms", section 3): whatever
        keeps to the limits is better than what does not, and among the rest less violation is better.
        """
        return (-self.violation(rewards), self._upwards(rewards)[0])

    def dominates(self, one: Sequence[float], other: Sequence[float]) -> bool:
        """Whether a result is at least as good in every goal and better in one."""
        a, b = self._upwards(one), self._upwards(other)
        return all(x >= y for x, y in zip(a, b, strict=True)) and a != b

    def on_front(self, results: Sequence[Sequence[float]]) -> tuple[int, ...]:
        """Places of the results that none of the others dominates; of equal ones the first."""
        found = []
        for i, mine in enumerate(results):
            twin = any(tuple(results[j]) == tuple(mine) for j in range(i))
            if not twin and not any(self.dominates(other, mine) for other in results):
                found.append(i)
        return tuple(found)

    def choose(self, results: Sequence[Sequence[float]]) -> int:
        """Place of the result to take.

        On the way to a front without limits it is the knee (Das, 1999, "On characterizing the knee of the Pareto
        curve"): the point of the front that lies furthest from the plane through the best results in each goal, which
        is the largest sum of the goals, each scaled so that the front spans 0 to 1. Otherwise the first goal decides
        among what keeps to the limits. Ties go to the earlier result.

        Raises:
            UsageError: without any result.
        """
        if not results:
            raise UsageError("there is no result to choose from")
        if self.mode != "pareto" or self.limits:
            return max(range(len(results)), key=lambda i: (self.merit(results[i]), -i))
        front = self.on_front(results)
        points = [self._upwards(results[i]) for i in front]
        low = [min(axis) for axis in zip(*points, strict=True)]
        span = [max(axis) - min(axis) for axis in zip(*points, strict=True)]
        depth = [sum((x - a) / s for x, a, s in zip(p, low, span, strict=True) if s > 0) for p in points]
        return front[depth.index(max(depth))]

    def _upwards(self, rewards: Sequence[float]) -> tuple[float, ...]:
        """The rewards with their signs such that more is better."""
        return tuple(v if d == "maximize" else -v for v, d in zip(rewards, self.directions, strict=True))
