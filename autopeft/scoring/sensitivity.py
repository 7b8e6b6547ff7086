"""AdaLoRA's importance: smoothed sensitivity times its uncertainty."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from autopeft.core.contracts import Task
from autopeft.core.scores import Scores
from autopeft.core.site import Catalog
from autopeft.errors import UsageError
from autopeft.scoring._hosts import assemble
from autopeft.scoring._measure import measure
from autopeft.scoring._moments import Moments
from autopeft.scoring._saliency import signed_root
from autopeft.scoring.gradient import Gradient

__all__ = ["Sensitivity"]


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """`score = I U`: moving averages, over the batches b, of `|w g_b|` and of its distance from its own average.

        I_b = beta1 I_(b-1) + (1 - beta1) |w g_b|,    U_b = beta2 U_(b-1) + (1 - beta2) | |w g_b| - I_b |,

    from zero (Zhang et al., "AdaLoRA", ICLR 2023, arXiv 2303.10512, equations 9 to 11; Zhang et al., "PLATON", ICML
    2022, for pre-trained weights as here). `signal = sign(g) sqrt(score)` with g the mean gradient. AdaLoRA smooths
    over the steps of a training; here the weights stand still and batches alone vary, so that U is the noise of the
    batches. Outputs of residual blocks hold no value, so nothing is kept about them.

    Attributes:
        gradient: the pass over the data, in mode `per_batch` and one process.
        beta1: decay of the sensitivity, from 0 to below 1.
        beta2: decay of the uncertainty, from 0 to below 1.
    """

    gradient: Gradient = field(default_factory=Gradient)
    beta1: float = 0.85
    beta2: float = 0.85

    def __post_init__(self) -> None:
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(
                    f"sensitivity.{name} must be at least 0 and below 1, got {getattr(self, name)}; AdaLoRA has 0.85"
                )

    def score(self, model: nn.Module, catalog: Catalog, task: Task, seed: int = 0) -> Scores:
        """Score every tensor of the catalogue on the task's inner split.

        Args:
            model: the model, on its device; left as it was found.
            catalog: its catalogue.
            task: the task.
            seed: of the order and augmentation of the samples.

        Raises:
            AutopeftError: as `Gradient.score` does.
            UsageError: in mode `per_sample`, or in a process group of several ranks.
        """
        smoothed: dict[str, _Smoothed] = {}

        def make(key: str, shape: torch.Size, like: Tensor, halves: bool) -> Moments:
            smoothed[key] = _Smoothed(shape, like, halves, self.beta1, self.beta2)
            return smoothed[key]

        found = measure(replace(self.gradient, blocks=False), model, catalog, task, seed, make)
        known = {}
        for key, k in found.known.items():
            score = smoothed.pop(key).importance()
            known[key] = replace(k, signal=signed_root(score, k.signal), score=score)
        return assemble(catalog, found.hosts, known, found.origin(self, catalog, task))


class _Smoothed(Moments):
    """The moving averages of one tensor, in the type of its sums."""

    def __init__(self, shape: torch.Size, like: Tensor, halves: bool, beta1: float, beta2: float) -> None:
        super().__init__(shape, like, halves)
        self._value = like.detach()
        self._betas = beta1, beta2
        self._mean, self._spread = torch.zeros_like(self.second), torch.zeros_like(self.second)

    def add(self, gradient: Tensor, weight: float, half: int) -> None:
        super().add(gradient, weight, half)
        beta1, beta2 = self._betas
        sensitivity = (gradient.to(self._mean.dtype) * self._value).abs_()
        self._mean.mul_(beta1).add_(sensitivity, alpha=1 - beta1)
        self._spread.mul_(beta2).add_(sensitivity.sub_(self._mean).abs_(), alpha=1 - beta2)

    def importance(self) -> Tensor:
        """Sensitivity times uncertainty, on the CPU; the averages are spent."""
        return self._mean.mul_(self._spread).cpu()
