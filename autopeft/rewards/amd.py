"""Distance of generated images to the training images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from autopeft.errors import UsageError
from autopeft.rewards._copies import amd
from autopeft.rewards._measured import FeatureReward
from autopeft.rewards._pick import Direction
from autopeft.rewards._studio import Studio
from autopeft.rewards.noise_difference import Rows

__all__ = ["AMD", "Between", "Space"]

Space = Literal["features", "pixels"]
Between = Literal["cosine", "l2"]


@dataclass(frozen=True, slots=True)
class AMD(FeatureReward):
    """Average minimum distance: the mean over generated images of the distance to the nearest training image.

    MemControl's measure of memorisation (Dutt et al., 2024, arXiv 2405.19458); higher is less memorised.

    Attributes:
        samples: how many images the model makes.
        seed: of the noise they are made from.
        extractor: name of a timm model, or `vit_tiny_fashion`.
        pretrained_path: file of the extractor's weights.
        space: `features` of the extractor, or `pixels`.
        distance: `cosine` for `1 - cos`, or `l2` per root of the number of entries.
        rows: `all` draws from every class and looks at every training image; `planted` is what images made for the
            conditions of the planted ones are away from these.
    """

    space: Space = "features"
    distance: Between = "cosine"
    rows: Rows = "all"

    direction: ClassVar[Direction] = "maximize"

    def __post_init__(self) -> None:
        FeatureReward.__post_init__(self)
        for name, known in (("space", get_args(Space)), ("distance", get_args(Between)), ("rows", get_args(Rows))):
            if getattr(self, name) not in known:
                raise UsageError(f"{name} of amd must be one of {', '.join(known)}, got {getattr(self, name)!r}")

    @property
    def metric(self) -> str:
        """`amd`, with space, distance and rows where they are not the usual ones."""
        unusual = (w for w in (self.space, self.distance, self.rows) if w not in ("features", "cosine", "all"))
        return "_".join(["amd", *unusual])

    def look(self, studio: Studio) -> Mapping[str, float]:
        """As the class says."""
        planted = self.rows == "planted"
        images = studio.generated(self.samples, self.seed, planted), studio.training(planted)
        if self.space == "features":
            generated, training = (studio.features(i, self.extractor, self.pretrained_path) for i in images)
        else:
            generated, training = images
        return {self.metric: amd(generated, training, self.distance)}
