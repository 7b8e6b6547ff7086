"""A search by gates, in the manner of S3Delta."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import torch

from autopeft.core.allocation import Allocation
from autopeft.pipeline.contenders import Candidate, Group
from autopeft.pipeline.rivals._gates import open_probabilities, sample
from autopeft.pipeline.rivals._kept import searched
from autopeft.pipeline.rivals._supernet import greedy, pool, rate_at, supernet
from autopeft.training.seeds import derive_seed

if TYPE_CHECKING:
    from autopeft.config.study import Study
    from autopeft.pipeline.prepare import Prepared

__all__ = ["S3Delta"]


@dataclass(frozen=True, slots=True)
class S3Delta:
    """Sparse structure search (Hu et al., NeurIPS 2022, arXiv 2206.07382) on the study's options.

    Every option stands behind a binary-concrete gate; the expected cost of the open gates is the budget at every step.
    Steps on the weights (inner split) and on the gates (outer split, first-order gradient) alternate; in the end the
    options are bought in the order of their probabilities while they fit. Not as released: the gradient of the gates
    is first-order, without a second copy of the model; the shift's derivative is exact; options are our menu's.

    Attributes:
        epochs: epochs of the search; those of a full training when None.
        rate: learning rate of Adam on the gates.
        temperature: of probabilities and of draws.
    """

    epochs: int | None = None
    rate: float = 0.1
    temperature: float = 1.0

    title: ClassVar[str] = "s3delta search"
    needs: ClassVar[tuple[str, ...]] = ()

    def group(self, prepared: Prepared, study: Study) -> Group:
        """The plan that the search ends with."""
        plan, seen = searched("s3delta", prepared, study, partial(self._search, prepared, study))
        return Group(self.title, "baseline", (Candidate(self.title, plan),), sample_epochs=seen)

    def _search(self, prepared: Prepared, study: Study) -> tuple[Allocation, int]:
        options = pool(prepared, study, smallest=True)
        budget = prepared.budget
        costs = torch.tensor([float(o.cost.of(budget.unit)) for o in options], dtype=torch.float64)
        alpha = torch.zeros(len(options), dtype=torch.float64, requires_grad=True)
        upper = torch.optim.Adam([alpha], lr=self.rate, betas=(0.5, 0.999))
        generator = torch.Generator().manual_seed(derive_seed(study.seed, "s3delta"))
        probabilities = partial(open_probabilities, costs=costs, limit=budget.limit, temperature=self.temperature)
        epochs = self.epochs or study.train.epochs
        with supernet(prepared, study, options) as net:
            total, step = epochs * net.steps_per_epoch, 0
            for epoch in range(epochs):
                outer = net.epoch(epoch, "outer")
                for batch in net.epoch(epoch):
                    with torch.no_grad():
                        net.set_gates(sample(probabilities(alpha), generator, self.temperature))
                    net.step(batch, rate_at(study, step, total))
                    step += 1
                    held = next(outer, None)
                    if held is None:
                        # The outer split is the smaller one: it is walked again.
                        outer = net.epoch(epoch + epochs * step, "outer")
                        held = next(outer)
                    net.set_gates(sample(probabilities(alpha), generator, self.temperature))
                    (alpha.grad,) = torch.autograd.grad(net.loss(held), alpha)
                    upper.step()
            seen = net.seen
        with torch.no_grad():
            scores = probabilities(alpha).tolist()
        return greedy(options, scores, budget, f"s3delta(epochs={epochs})"), seen
