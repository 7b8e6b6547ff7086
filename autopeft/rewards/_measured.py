"""Rewards that measure one number of their own."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from autopeft.core.outcome import Outcome, Split
from autopeft.errors import UsageError
from autopeft.rewards._features import BUNDLED
from autopeft.rewards._pick import Direction, pick
from autopeft.rewards._studio import Studio

if TYPE_CHECKING:
    from torch import nn

    from autopeft.core.contracts import Task

__all__ = ["FeatureReward", "GeneratedReward", "Measured"]


class Measured:
    """A reward of one number that it measures itself, under the name `metric`.

    Satisfies `autopeft.core.contracts.Reward`. A subclass says how in `look`, which several rewards can call on one
    `Studio` so that images are generated once.
    """

    __slots__ = ()

    direction: ClassVar[Direction]

    @property
    def metric(self) -> str:
        """What the number is called."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it measures")

    @property
    def goals(self) -> tuple[str, ...]:
        """The direction."""
        return (self.direction,)

    @property
    def names(self) -> tuple[str, ...]:
        """The metric's name."""
        return (self.metric,)

    @property
    def watched(self) -> str | None:
        """The task's metric that stands for this one while the model trains; None where nothing does.

        Trials are stopped early by what is watched, so it must point where the goal points: a denoising loss stands for
        FID, and for no measure of memorisation.
        """
        return None

    @abstractmethod
    def look(self, studio: Studio) -> Mapping[str, float]:
        """Measure, in a studio that other rewards may share."""
        raise NotImplementedError(f"{type(self).__name__} measures nothing")

    def measure(self, model: nn.Module, task: Task, split: Split) -> Mapping[str, float]:
        """The number, and what tells how sure it is."""
        return self.look(Studio(model, task, split))

    def value(self, outcome: Outcome) -> tuple[float, ...]:
        """The number.

        Raises:
            UnknownKey: when the outcome has no metric of this name.
            UsageError: when the outcome is not done.
        """
        return (pick(outcome, self.metric),)


@dataclass(frozen=True, slots=True)
class GeneratedReward(Measured):
    """A number about images that the model makes.

    Attributes:
        samples: how many it makes.
        seed: of the noise they are made from, the same in every trial, so that trials differ by their models alone.
    """

    samples: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.samples, bool) or self.samples < 3:
            raise UsageError(f"samples of a reward must be a whole number of at least 3, got {self.samples!r}")
        if self.seed < 0:
            raise UsageError(f"the seed of a reward must be at least 0, got {self.seed}")


@dataclass(frozen=True, slots=True)
class FeatureReward(GeneratedReward):
    """A number about features of images that the model makes.

    Attributes:
        samples: how many images it makes.
        seed: of the noise they are made from.
        extractor: name of a timm model, or `vit_tiny_fashion`, which comes with the package.
        pretrained_path: file of the extractor's weights.
    """

    extractor: str = BUNDLED
    pretrained_path: str | None = None
