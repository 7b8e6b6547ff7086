"""Gradients preconditioned by their second moment."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from autopeft.core.contracts import Task
from autopeft.core.scores import Scores
from autopeft.core.site import Catalog
from autopeft.errors import UsageError
from autopeft.scoring._hosts import Known, assemble
from autopeft.scoring._measure import measure
from autopeft.scoring.gradient import Gradient

__all__ = ["Fisher"]


@dataclass(frozen=True, slots=True)
class Fisher:
    """The mean gradient in the coordinates of a preconditioned optimiser.

    With the mean gradient g and the diagonal F of the empirical Fisher information,

        signal = g / (F + damping * mean(F)) ** (power / 2),    score = signal ** 2.

    A step along `-g / F**power` lowers the loss by `g^2 / F**power` to first order, which is the score. Power 0 is
    plain descent: the signal is that of `Gradient`. Power 1 is natural gradient, and ranks by signal-to-noise ratio
    alone: where gradients are noise it is the same everywhere. Adam divides by the root of its second moment, power
    1/2, hence the default: the score is then the first-order decrease of a step of the optimiser that will train the
    adapters, and scaling the loss by c scales it by c, not c^2.

    F is the mean squared gradient, times the mean batch size in mode `per_batch`: the variance of a mean over b
    samples is that of one sample over b, so that both modes estimate the same F where noise rules. The mean that
    damping refers to is over all entries of all scored tensors, so that the currency is one for the whole model; the
    output matrices of blocks have one of their own.

    Attributes:
        gradient: the pass over the data. Its halves are preconditioned like the signal, which is their mean; the mean
            of squares is always kept, as `square`.
        power: exponent of the second moment, from 0 to 1.
        damping: share of the mean second moment that is added to each.
    """

    gradient: Gradient = field(default_factory=Gradient)
    power: float = 0.5
    damping: float = 1e-3

    def __post_init__(self) -> None:
        if not 0 <= self.power <= 1:
            raise UsageError(f"fisher.power must lie between 0 (plain) and 1 (natural gradient), got {self.power}")
        if not (math.isfinite(self.damping) and self.damping > 0):
            raise UsageError(f"fisher.damping must be positive and finite, got {self.damping}; try 1e-3")

    def score(self, model: nn.Module, catalog: Catalog, task: Task, seed: int = 0) -> Scores:
        """Score every tensor of the catalogue on the task's inner split.

        Args:
            model: the model, on its device; left as it was found.
            catalog: its catalogue.
            task: the task.
            seed: of the order and augmentation of the samples.

        Raises:
            AutopeftError: as `Gradient.score` does.
        """
        found = measure(self.gradient, model, catalog, task, seed)
        known: dict[str, Known] = {}
        squares = {key: replace(k, square=k.score.div_(found.units)) for key, k in found.known.items()}
        outputs = {site.name for site in found.hosts.blocks} & set(found.known)
        for keys in (set(found.known) - outputs, outputs):
            part = {key: k for key, k in squares.items() if key in keys}
            known |= self._preconditioned(part, found.samples / found.units)
        return assemble(catalog, found.hosts, known, found.origin(self, catalog, task))

    def _preconditioned(self, known: Mapping[str, Known], scale: float) -> dict[str, Known]:
        damping = self.damping * scale * _mean([_square(k) for k in known.values()])
        return {key: self._one(k, scale, damping) for key, k in known.items()}

    def _one(self, known: Known, scale: float, damping: float) -> Known:
        # Where every gradient is exactly zero, so is the signal, whatever it is divided by.
        denominator = (_square(known) * scale + damping).pow_(self.power / 2) if damping > 0 else None

        def divide(tensor: Tensor | None) -> Tensor | None:
            return tensor if tensor is None or denominator is None else tensor.div_(denominator)

        signal = divide(known.signal)
        assert signal is not None
        return replace(
            known, signal=signal, score=signal.square(), half_a=divide(known.half_a), half_c=divide(known.half_c)
        )


def _square(known: Known) -> Tensor:
    assert known.square is not None
    return known.square


def _mean(tensors: Iterable[Tensor]) -> float:
    total, entries = 0.0, 0
    for tensor in tensors:
        total += float(tensor.sum(dtype=torch.float64))
        entries += tensor.numel()
    return total / max(entries, 1)
