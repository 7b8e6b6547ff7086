"""Hessian-aware saliency: the second-order cost of removing an entry."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import nn

from autopeft.core.contracts import Task
from autopeft.core.scores import Scores
from autopeft.core.site import Catalog
from autopeft.scoring._hosts import assemble
from autopeft.scoring._measure import measure
from autopeft.scoring._saliency import signed_root, values_of
from autopeft.scoring.gradient import Gradient

__all__ = ["NViT"]


@dataclass(frozen=True, slots=True)
class NViT:
    """`score = w^2 F`, `signal = sign(g) |w| sqrt(F)`, with F the squared gradient in place of the Hessian's diagonal.

    The quadratic form `w^T H w` of removing a structure, with H from gradients (Yang et al., "Global Vision Transformer
    Pruning with Hessian-Aware Saliency", CVPR 2023, arXiv 2110.04869), for structures of one entry: sites are valued by
    the methods on offer, not as heads and neurons. F is the mean squared gradient, times the mean batch size in mode
    `per_batch`, as in `Fisher`. Made for pruning: an entry that is zero scores zero. Outputs of residual blocks hold no
    value, so nothing is kept about them.

    Attributes:
        gradient: the pass over the data.
    """

    gradient: Gradient = field(default_factory=Gradient)

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
        found = measure(replace(self.gradient, blocks=False), model, catalog, task, seed)
        known = {}
        for key, value in values_of(found.hosts):
            k = found.known[key]
            square = k.score.div_(found.units)
            score = value.square().mul_(square).mul_(found.samples / found.units)
            known[key] = replace(k, signal=signed_root(score, k.signal), score=score, square=square)
        return assemble(catalog, found.hosts, known, found.origin(self, catalog, task))
