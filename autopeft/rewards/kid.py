"""Kernel distance between generated and real images, without bias."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from autopeft.rewards._measured import FeatureReward
from autopeft.rewards._mmd import polynomial_mmd
from autopeft.rewards._pick import Direction
from autopeft.rewards._studio import Studio

__all__ = ["KID"]


@dataclass(frozen=True, slots=True)
class KID(FeatureReward):
    """The unbiased squared MMD with a cubic kernel (Binkowski et al., 2018), and `kid_error`, its standard error.

    Values at different numbers of samples can be compared, where FID's cannot; near 0 it may be negative.

    Attributes:
        samples: how many images the model makes.
        seed: of the noise they are made from.
        extractor: name of a timm model, or `vit_tiny_fashion`.
        pretrained_path: file of the extractor's weights.
    """

    direction: ClassVar[Direction] = "minimize"

    @property
    def metric(self) -> str:
        """`kid`."""
        return "kid"

    @property
    def watched(self) -> str:
        """The denoising loss: nothing is generated before the end."""
        return "denoising_loss"

    def look(self, studio: Studio) -> Mapping[str, float]:
        """As the class says."""
        generated, real = (
            studio.features(images, self.extractor, self.pretrained_path)
            for images in (studio.generated(self.samples, self.seed), studio.real())
        )
        found = polynomial_mmd(generated, real)
        return {"kid": found.value, "kid_error": found.error}
