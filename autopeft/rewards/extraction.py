"""Training images that can be got out of the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from autopeft.errors import UsageError
from autopeft.rewards._copies import extracted
from autopeft.rewards._measured import GeneratedReward
from autopeft.rewards._pick import Direction
from autopeft.rewards._studio import Studio

__all__ = ["Extraction"]


@dataclass(frozen=True, slots=True)
class Extraction(GeneratedReward):
    """How many different training images the model gives back again and again.

    A training image counts when `clique` generated images are nearer than `threshold` to it and to each other, by the
    largest of 16 tiles' root mean square difference (Carlini et al., 2023, arXiv 2301.13188, section 4.2).

    Attributes:
        samples: how many images the model makes; what it does not give back in so many is not seen.
        seed: of the noise they are made from.
        threshold: largest tile distance of a copy; pixels lie in [-1, 1], so that unrelated noise is near 0.8.
        clique: generated images that must agree.
        tiles: tiles along each side.
    """

    threshold: float = 0.2
    clique: int = 3
    tiles: int = 4

    direction: ClassVar[Direction] = "minimize"

    def __post_init__(self) -> None:
        GeneratedReward.__post_init__(self)
        if not self.threshold > 0:
            raise UsageError(f"the threshold of extraction must be above 0, got {self.threshold}")
        if self.clique < 1 or self.tiles < 1:
            raise UsageError(f"clique and tiles of extraction must be at least 1, got {self.clique} and {self.tiles}")

    @property
    def metric(self) -> str:
        """`extracted`."""
        return "extracted"

    def look(self, studio: Studio) -> Mapping[str, float]:
        """As the class says."""
        images = studio.generated(self.samples, self.seed), studio.training()
        return {"extracted": float(extracted(*images, self.threshold, self.clique, self.tiles))}
