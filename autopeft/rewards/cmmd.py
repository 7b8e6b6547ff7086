"""Gaussian-kernel distance between generated and real images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from autopeft.errors import UsageError
from autopeft.rewards._measured import FeatureReward
from autopeft.rewards._mmd import gaussian_mmd
from autopeft.rewards._pick import Direction
from autopeft.rewards._studio import Studio

__all__ = ["CMMD"]

_SCALE = 1000.0


@dataclass(frozen=True, slots=True)
class CMMD(FeatureReward):
    """1000 times the squared MMD with a Gaussian kernel on features of unit length, and `cmmd_error`.

    CMMD as Jayasumana et al., 2024, arXiv 2401.09603, define it, on this extractor's features in place of CLIP's.

    Attributes:
        samples: how many images the model makes.
        seed: of the noise they are made from.
        extractor: name of a timm model, or `vit_tiny_fashion`.
        pretrained_path: file of the extractor's weights.
        sigma: width of the kernel.
    """

    sigma: float = 10.0

    direction: ClassVar[Direction] = "minimize"

    def __post_init__(self) -> None:
        FeatureReward.__post_init__(self)
        if not self.sigma > 0:
            raise UsageError(f"sigma of cmmd must be above 0, got {self.sigma}")

    @property
    def metric(self) -> str:
        """`cmmd`."""
        return "cmmd"

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
        found = gaussian_mmd(generated, real, self.sigma)
        return {"cmmd": _SCALE * found.value, "cmmd_error": _SCALE * found.error}
