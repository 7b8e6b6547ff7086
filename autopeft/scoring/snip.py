"""Connection sensitivity: what removing an entry would change."""

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

__all__ = ["SNIP"]


@dataclass(frozen=True, slots=True)
class SNIP:
    """`score = |w g|`, `signal = sign(g) sqrt(score)`, with g the mean gradient and w the pre-trained value.

    The first-order change of the loss when the entry is taken away (Lee, Ajanthan and Torr, "SNIP: Single-shot network
    pruning based on connection sensitivity", ICLR 2019, arXiv 1810.02340, equation 5, without the normalisation, which
    is one number for the whole model). Made for pruning: an entry that is zero scores zero, whatever its gradient.
    Outputs of residual blocks hold no value, so nothing is kept about them.

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
            score = (k.signal * value).abs_()
            known[key] = replace(k, signal=signed_root(score, k.signal), score=score)
        return assemble(catalog, found.hosts, known, found.origin(self, catalog, task))
