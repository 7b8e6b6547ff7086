"""FID with a penalty on copies of training images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from autopeft.errors import UsageError
from autopeft.rewards._copies import memorisation_penalty
from autopeft.rewards._frechet import fid
from autopeft.rewards._measured import FeatureReward
from autopeft.rewards._pick import Direction
from autopeft.rewards._studio import Studio

__all__ = ["MiFID"]


@dataclass(frozen=True, slots=True)
class MiFID(FeatureReward):
    """FID against the split's images, divided by the mean distance to the training images where that is small.

    Bai et al., 2021, arXiv 2106.03062. It is one number for quality and memorisation together; with `fid` and `amd`
    as two goals the search sees both. Beside it goes `mifid_penalty`, what FID was multiplied by.

    Attributes:
        samples: how many images the model makes.
        seed: of the noise they are made from.
        extractor: name of a timm model, or `vit_tiny_fashion`.
        pretrained_path: file of the extractor's weights.
        threshold: mean cosine distance from which on nothing counts as memorised; it depends on the extractor.
    """

    threshold: float = 0.1

    direction: ClassVar[Direction] = "minimize"

    def __post_init__(self) -> None:
        FeatureReward.__post_init__(self)
        if not self.threshold > 0:
            raise UsageError(f"the threshold of mifid must be above 0, got {self.threshold}")

    @property
    def metric(self) -> str:
        """`mifid`."""
        return "mifid"

    @property
    def watched(self) -> str:
        """The denoising loss: nothing is generated before the end."""
        return "denoising_loss"

    def look(self, studio: Studio) -> Mapping[str, float]:
        """As the class says."""
        generated, real, training = (
            studio.features(images, self.extractor, self.pretrained_path)
            for images in (studio.generated(self.samples, self.seed), studio.real(), studio.training())
        )
        penalty = memorisation_penalty(generated, training, self.threshold)
        return {"mifid": fid(generated, real) * penalty, "mifid_penalty": penalty}
