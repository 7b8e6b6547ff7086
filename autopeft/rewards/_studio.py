"""What generative rewards look at: generated, real and training images and their features, each made once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from autopeft.core.contracts import Task
from autopeft.core.outcome import Split
from autopeft.errors import UsageError
from autopeft.rewards._features import features

__all__ = ["GenerativeTask", "Studio", "borrowed", "generative"]


@runtime_checkable
class GenerativeTask(Protocol):
    """A task whose model makes images."""

    def sample(self, model: nn.Module, n: int, seed: int, labels: Tensor | None = None) -> Tensor:
        """Images (n, C, H, W) in [-1, 1]; the same for the same model, number, seed and labels."""
        ...

    def training_images(self) -> Tensor:
        """The images that are trained on, (m, C, H, W) in [-1, 1]."""
        ...

    def images(self, split: Split) -> Tensor:
        """The images of a split, in the same scale; those of the test split only once it is unsealed."""
        ...


class Studio:
    """One look at one model: what several rewards need is made once.

    Args:
        model: the model with its adapters; modes, flags, weights and the random state are left as found.
        task: the task.
        split: where the real images come from.
    """

    def __init__(self, model: nn.Module, task: Task, split: Split) -> None:
        self.model, self.task, self.split = model, task, split
        self._made: dict[tuple[Any, ...], Tensor] = {}

    def generated(self, n: int, seed: int, planted: bool = False) -> Tensor:
        """Samples of the model, (n, C, H, W) in [-1, 1] on the CPU.

        Args:
            n: how many.
            seed: of the noise they are made from.
            planted: whether the model is told the conditions of the planted images, in turn.

        Raises:
            UsageError: when the task's model makes no images, or the task has no planted ones.
        """
        key = ("generated", n, seed, planted)
        if key not in self._made:
            task = generative(self.task)
            labels = None
            if planted:
                rows = torch.tensor(_planted(task))
                labels = task.conditions(rows)[torch.arange(n) % len(rows)]  # type: ignore[attr-defined]
            with borrowed(self.model):
                made = task.sample(self.model, n, seed, labels).detach().float().cpu()
            if made.ndim != 4 or len(made) != n:
                raise UsageError(f"the task was asked for {n} images and gave a tensor of shape {tuple(made.shape)}")
            self._made[key] = made
        return self._made[key]

    def real(self) -> Tensor:
        """The split's images."""
        if ("real",) not in self._made:
            self._made["real",] = generative(self.task).images(self.split).detach().float().cpu()
        return self._made["real",]

    def training(self, planted: bool = False) -> Tensor:
        """The training images, or the planted ones of them.

        Raises:
            UsageError: when the task has no planted ones.
        """
        key = ("training", planted)
        if key not in self._made:
            task = generative(self.task)
            images = task.training_images().detach().float().cpu()
            self._made[key] = images[torch.tensor(_planted(task))] if planted else images
        return self._made[key]

    def features(self, images: Tensor, extractor: str, pretrained_path: str | None) -> Tensor:
        """Features of images that this studio gave, (n, d)."""
        key = ("features", id(images), extractor, pretrained_path)
        if key not in self._made:
            self._made[key] = features(images, extractor, pretrained_path)
        return self._made[key]


def generative(task: Task) -> GenerativeTask:
    """The task as one whose model makes images.

    Raises:
        UsageError: when it is none.
    """
    if not isinstance(task, GenerativeTask):
        raise UsageError(
            f"{type(task).__name__} makes no images; this reward needs a task such as diffusion, whose `sample`, "
            f"`images` and `training_images` give some"
        )
    return task


def _planted(task: GenerativeTask) -> tuple[int, ...]:
    rows = tuple(getattr(task, "planted", ()))
    if not rows or not hasattr(task, "conditions"):
        raise UsageError(
            "this reward looks at planted images, and the task has none; plant some (`?planted=4&repeat=16` behind the "
            "data) or let it look at all"
        )
    return rows


@contextmanager
def borrowed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module's mode and the random state are put back."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.random.fork_rng(), torch.no_grad():
            model.eval()
            yield
    finally:
        for module, mode in modes:
            module.training = mode
