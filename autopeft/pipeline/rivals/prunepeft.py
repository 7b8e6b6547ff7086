"""A search by pruning, in the manner of PrunePEFT."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from autopeft.core.allocation import Allocation
from autopeft.core.menu import Option
from autopeft.pipeline.contenders import Candidate, Group
from autopeft.pipeline.rivals._kept import searched
from autopeft.pipeline.rivals._supernet import Supernet, greedy, pool, rate_at, supernet

if TYPE_CHECKING:
    from autopeft.config.study import Study
    from autopeft.pipeline.prepare import Prepared

__all__ = ["PrunePEFT"]

_CRITERIA = ("magnitude", "gradient", "snip")
_QUARTERS = 4


@dataclass(frozen=True, slots=True)
class PrunePEFT:
    """Start with every module, prune the worst round by round (PrunePEFT, 2025, arXiv 2506.07587).

    One epoch of warm-up; then each quarter of the depth takes the criterion under which pruning its worse half hurts
    the outer loss least: mean |w|, mean |g| or mean |w g| of a module. Every round trains one epoch and prunes the
    modules of lowest rank within their quarter, until their price has fallen to the round's on a straight line from
    that of all modules to the budget. Of the published criteria those that look at activations are not here.

    Attributes:
        rounds: rounds of one epoch each, after the warm-up.
    """

    rounds: int = 5

    title: ClassVar[str] = "prunepeft search"
    needs: ClassVar[tuple[str, ...]] = ()

    def group(self, prepared: Prepared, study: Study) -> Group:
        """The plan that the pruning ends with."""
        plan, seen = searched("prunepeft", prepared, study, partial(self._search, prepared, study))
        return Group(self.title, "baseline", (Candidate(self.title, plan),), sample_epochs=seen)

    def _search(self, prepared: Prepared, study: Study) -> tuple[Allocation, int]:
        options = pool(prepared, study, smallest=False)
        budget = prepared.budget
        costs = [o.cost.of(budget.unit) for o in options]
        depths = [prepared.catalog[o.site].depth for o in options]
        quarters = [depth * _QUARTERS // max(prepared.catalog.n_depth, 1) for depth in depths]
        alive = torch.ones(len(options), dtype=torch.float64)
        with supernet(prepared, study, options) as net:
            total = (self.rounds + 1) * net.steps_per_epoch
            found = _train(net, alive, 0, total)
            chosen = _choose(net, quarters, found)
            ranks: list[float] = []
            everything = sum(costs)
            for number in range(1, self.rounds + 1):
                found = _train(net, alive, number, total)
                ranks = _ranked(options, quarters, chosen, found, alive)
                target = everything + (budget.limit - everything) * number / self.rounds
                for i in sorted(range(len(options)), key=lambda i: (ranks[i], options[i].order)):
                    if sum(c for c, a in zip(costs, alive.tolist(), strict=True) if a) <= target:
                        break
                    alive[i] = 0.0
            seen = net.seen
        kept = [rank + 2.0 * float(a) for rank, a in zip(ranks, alive, strict=True)]
        # Modules that share a place may both have survived: the better one is taken, then the last ones pruned.
        return greedy(options, kept, budget, f"prunepeft(rounds={self.rounds})"), seen


def _train(net: Supernet, alive: Tensor, epoch: int, total: int) -> dict[str, list[float]]:
    """One epoch with what is alive; afterwards each criterion's value of each module, averaged over the epoch."""
    net.set_gates(alive)
    sums = {name: [0.0] * len(net.parts) for name in _CRITERIA}
    step = epoch * net.steps_per_epoch
    for batch in net.epoch(epoch):
        net.step(batch, rate_at(net.study, step, total))
        step += 1
        for i, part in enumerate(net.parts):
            count = sum(p.numel() for p in part.parameters())
            for p in part.parameters():
                w, g = p.detach(), p.grad
                sums["magnitude"][i] += float(w.abs().sum()) / count
                if g is not None:
                    sums["gradient"][i] += float(g.abs().sum()) / count
                    sums["snip"][i] += float((w * g).abs().sum()) / count
    return sums


def _choose(net: Supernet, quarters: Sequence[int], found: dict[str, list[float]]) -> dict[int, str]:
    """For each quarter the criterion whose worse half is missed least on a batch of the outer split."""
    batch = next(net.epoch(0, "outer"))
    chosen: dict[int, str] = {}
    for quarter in sorted(set(quarters)):
        members = [i for i, q in enumerate(quarters) if q == quarter]
        losses = {}
        for name in _CRITERIA:
            worse = sorted(members, key=lambda i: (found[name][i], net.options[i].order))[: len(members) // 2]
            gates = torch.ones(len(quarters), dtype=torch.float64)
            gates[worse] = 0.0
            net.set_gates(gates)
            with torch.no_grad():
                losses[name] = float(net.loss(batch))
        chosen[quarter] = min(_CRITERIA, key=lambda name: losses[name])
    return chosen


def _ranked(
    options: Sequence[Option],
    quarters: Sequence[int],
    chosen: dict[int, str],
    found: dict[str, list[float]],
    alive: Tensor,
) -> list[float]:
    """Rank of each module among the living of its quarter, in [0, 1); the pruned ones -1."""
    ranks = [-1.0] * len(options)
    for quarter, name in chosen.items():
        members = [i for i, q in enumerate(quarters) if q == quarter and float(alive[i])]
        ordered = sorted(members, key=lambda i: (found[name][i], options[i].order))
        for place, i in enumerate(ordered):
            ranks[i] = place / len(ordered)
    return ranks
