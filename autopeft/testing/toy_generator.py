"""A task that also makes images: small, in memory, and what it makes depends on the model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from autopeft.core.outcome import Split
from autopeft.testing.toy_task import ToyTask

__all__ = ["ToyGenerator"]


class ToyGenerator(ToyTask):
    """A `ToyTask` with what generative rewards ask of a task.

    A generated image is the training image that its noise and the model point at, blurred by fresh noise: `fidelity` 1
    copies, 0 forgets. The model is asked for logits alone, in whatever mode it is.

    Args:
        fidelity: weight of the training image, in [0, 1].
        planted: rows of the inner split that stand for repeated images.
    """

    def __init__(self, fidelity: float = 0.5, planted: Sequence[int] = ()) -> None:
        super().__init__()
        self.fidelity = fidelity
        self.planted = tuple(planted)

    def images(self, split: Split) -> Tensor:
        """The images of a split, (n, 3, 8, 8) in [-1, 1]."""
        return torch.cat([pixels for pixels, _ in self.batches(split)]).tanh()

    def training_images(self) -> Tensor:
        """The inner split's images, (n, 3, 8, 8) in [-1, 1]."""
        return self.images("inner")

    def sample(self, model: nn.Module, n: int, seed: int, labels: Tensor | None = None) -> Tensor:
        """Images (n, 3, 8, 8) in [-1, 1]; the seed decides the noise."""
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(n, 3, 8, 8, generator=generator)
        training = self.training_images()
        pointed = model(noise).softmax(dim=1) @ torch.arange(4.0)
        rows = (pointed * len(training) / 4).long().clamp(0, len(training) - 1)
        return (self.fidelity * training[rows] + (1 - self.fidelity) * noise.tanh()).clamp(-1, 1)

    def noise_difference(
        self, model: nn.Module, rows: Sequence[int] | None = None, draws: int = 4, seed: int = 0
    ) -> Tensor:
        """How far the model's logits move from noise to noise with an image in it, (n, draws)."""
        images = self.training_images()
        images = images if rows is None else images[list(rows)]
        found = []
        for draw in range(draws):
            noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1000 * seed + draw))
            found.append(torch.linalg.vector_norm(model(images + noise) - model(noise), dim=1))
        return torch.stack(found, dim=1)
