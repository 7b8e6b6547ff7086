"""Several rewards as one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from autopeft.core.contracts import Reward
from autopeft.core.outcome import Outcome, Split
from autopeft.errors import UsageError
from autopeft.rewards._measured import Measured
from autopeft.rewards._studio import Studio

if TYPE_CHECKING:
    from torch import nn

    from autopeft.core.contracts import Task

__all__ = ["Joint"]


@dataclass(frozen=True, slots=True)
class Joint:
    """The goals of several rewards, in their order; satisfies `autopeft.core.contracts.Reward`.

    `reward: {type: joint, parts: [fid, {type: amd, space: pixels}, parameters]}`. Images and features that several
    parts look at are made once.

    Attributes:
        parts: at least one reward; two must not call a number alike.

    Raises:
        UsageError: without parts, or when two give a number of one name.
    """

    parts: tuple[Reward, ...] = field(metadata={"plugins": "rewards"})

    def __post_init__(self) -> None:
        if not self.parts:
            raise UsageError("a joint reward needs at least one part")
        twice = sorted({name for name in self.names if self.names.count(name) > 1})
        if twice:
            raise UsageError(f"two parts of a joint reward both give {', '.join(twice)}; keep one of them")

    @property
    def goals(self) -> tuple[str, ...]:
        """The parts' directions."""
        return tuple(goal for part in self.parts for goal in part.goals)

    @property
    def names(self) -> tuple[str, ...]:
        """The parts' names."""
        return tuple(name for part in self.parts for name in part.names)

    @property
    def watched(self) -> str | None:
        """The first part's, so that trials are stopped early where a goal of quality is in front."""
        watched: str | None = getattr(self.parts[0], "watched", self.parts[0].names[0])
        return watched

    def measure(self, model: nn.Module, task: Task, split: Split) -> Mapping[str, float]:
        """What the parts measure.

        Raises:
            UsageError: when two parts measure different numbers under one name.
        """
        studio, found = Studio(model, task, split), dict[str, float]()
        for part in self.parts:
            measured = part.look(studio) if isinstance(part, Measured) else part.measure(model, task, split)
            for name, value in measured.items():
                if found.setdefault(name, value) != value:
                    raise UsageError(
                        f"two parts of the joint reward measure {name} as {found[name]} and {value}; give them equal "
                        f"settings"
                    )
        return found

    def value(self, outcome: Outcome) -> tuple[float, ...]:
        """The parts' numbers."""
        return tuple(value for part in self.parts for value in part.value(outcome))
