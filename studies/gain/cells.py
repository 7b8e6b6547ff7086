"""The models and tasks of the study, and the options that are measured on each."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from autopeft.allocation.indices import attach_indices
from autopeft.config.study import DataSettings, Study
from autopeft.core.allocation import Allocation
from autopeft.core.menu import Option
from autopeft.models.spec import ModelSpec
from autopeft.pipeline.prepare import Prepared

__all__ = ["BANDS", "CELLS", "Cell", "alone", "band_of", "sampled"]

BANDS = ((1 / 512, 1 / 64), (1 / 64, 1 / 16), (1 / 16, 1 / 4), (1 / 4, 1.0))
"""Prices, as shares of the budget: within a band they differ by a factor of four at most, or eight in the cheapest."""


@dataclass(frozen=True)
class Cell:
    """One model on one task.

    Attributes:
        model: a key of `MODELS`.
        data: a folder below the study's assets, or `digits`.
        inner: samples that options are trained on.
        epochs: passes over them.
        scales: factors of the learning rates; each option is trained once at each.
    """

    model: str
    data: str
    inner: int
    epochs: int
    scales: tuple[float, ...]

    @property
    def name(self) -> str:
        return f"{self.model} on {self.data}"

    def study(self, assets: Path) -> Study:
        """The study behind the cell; everything is offered that merges."""
        spec, file, size = MODELS[self.model]
        path = str(assets / file) if file else None
        data = self.data if self.data == "digits" else str(assets / self.data)
        base = Study()
        return dataclasses.replace(
            base,
            model=ModelSpec(spec, pretrained_path=path, img_size=size),
            data=DataSettings(data, max_inner=self.inner),
            train=dataclasses.replace(base.train, epochs=self.epochs, threads=1),
        )


MODELS: dict[str, tuple[str, str | None, int | None]] = {
    "bundled": ("bundled:vit_tiny_fashion", None, None),
    "vit-s14": ("vit_small_patch14_dinov2", "vit_small_patch14.safetensors", 42),
}

CELLS = (
    Cell("bundled", "animals", 400, 4, (0.316, 1.0, 3.16)),
    Cell("vit-s14", "cifar10", 200, 3, (1.0, 3.16)),
    Cell("bundled", "digits", 400, 4, (0.316, 1.0, 3.16)),
    Cell("vit-s14", "animals", 200, 3, (1.0, 3.16)),
)


def band_of(cost: int, limit: int) -> int | None:
    """The number of the band that a price lies in; None below the cheapest one."""
    return next((i for i, (low, high) in enumerate(BANDS) if low < cost / limit <= high), None)


def sampled(options: Sequence[Option], families: dict[str, str], limit: int, count: int, seed: int) -> list[Option]:
    """Options drawn in turn from every band and family of methods, at random within them."""
    rng = np.random.default_rng(seed)
    strata: dict[tuple[int, str], list[Option]] = {}
    for option in options:
        band = band_of(option.cost.trainable, limit)
        if band is not None:
            strata.setdefault((band, families[option.method]), []).append(option)
    queues = [[found[i] for i in rng.permutation(len(found))] for _, found in sorted(strata.items())]
    drawn: list[Option] = []
    while len(drawn) < count and any(queues):
        for queue in queues:
            if queue and len(drawn) < count:
                drawn.append(queue.pop())
    return drawn


def alone(prepared: Prepared, option: Option) -> Allocation:
    """A plan of one option."""
    plan = Allocation((option,), prepared.budget)
    return attach_indices(plan, prepared.study.methods, prepared.scores, None)
