"""Fréchet distance between generated and real images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from autopeft.errors import UsageError
from autopeft.rewards._frechet import extrapolate, fid
from autopeft.rewards._measured import FeatureReward
from autopeft.rewards._pick import Direction
from autopeft.rewards._studio import Studio

__all__ = ["FID"]


@dataclass(frozen=True, slots=True)
class FID(FeatureReward):
    """FID of the model's samples against the split's images (Heusel et al., 2017), or FID-infinity.

    FID at n samples is too large by about c / n, with a c of each model's own (Chong and Forsyth, 2020): a model may
    win by its bias. Beside `fid` goes `fid_samples`; `infinity` extrapolates over eight sizes from n / 4 to n and tells
    `fid_error`, its standard error, and `fid_needed`, samples at which the bias is below `tolerance` of the value. It
    is an FID of this extractor, not of Inception.

    Attributes:
        samples: how many images the model makes.
        seed: of the noise they are made from.
        extractor: name of a timm model, or `vit_tiny_fashion`.
        pretrained_path: file of the extractor's weights.
        infinity: follow the estimate to infinitely many samples.
        tolerance: share of the value, for `fid_needed`.
    """

    infinity: bool = False
    tolerance: float = 0.05

    direction: ClassVar[Direction] = "minimize"

    def __post_init__(self) -> None:
        FeatureReward.__post_init__(self)
        if self.infinity and self.samples < 16:
            raise UsageError(f"FID-infinity needs at least 16 samples, got {self.samples}")
        if not self.tolerance > 0:
            raise UsageError(f"the tolerance of FID must be above 0, got {self.tolerance}")

    @property
    def metric(self) -> str:
        """`fid`, or `fid_infinity`."""
        return "fid_infinity" if self.infinity else "fid"

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
        found = {"fid": fid(generated, real), "fid_samples": float(self.samples)}
        if not self.infinity:
            return found
        sizes = tuple(self.samples // 4 + round(i * (self.samples - self.samples // 4) / 7) for i in range(8))
        ideal = extrapolate(generated, real, sizes, self.seed)
        needed = abs(ideal.slope) / (self.tolerance * max(abs(ideal.value), 1e-12))
        return {**found, "fid_infinity": ideal.value, "fid_error": ideal.error, "fid_needed": needed}
