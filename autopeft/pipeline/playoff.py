"""The end of a search by short trials: its winner trained in full, at its own learning rates and at larger ones."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from autopeft.pipeline.costs import run_cost
from autopeft.pipeline.finish import Finalist

if TYPE_CHECKING:
    from autopeft.pipeline.effort import Effort
    from autopeft.pipeline.ledger import Entry
    from autopeft.pipeline.prepare import Prepared
    from autopeft.pipeline.runner import Runner

__all__ = ["play_off", "playoff_cost"]

_SCALES = (1.0, 10**0.5)
"""What is best after a third of a training is too small a rate for a whole one; see studies/selection."""


def playoff_cost(prepared: Prepared, effort: Effort) -> float:
    """Passes that a playoff takes."""
    return len(_SCALES) * run_cost(prepared, effort.epochs, effort.fraction)


def play_off(runner: Runner, winner: Finalist, effort: Effort) -> list[tuple[Finalist, Entry]]:
    """The winner of the short trials at each learning rate, trained in full on the inner split.

    Args:
        runner: trains through the ledger.
        winner: what the short trials have chosen.
        effort: full fidelity.

    Returns:
        What ran, the most successful first; trainings that failed are last.
    """
    ran = []
    for scale in _SCALES:
        train = dataclasses.replace(
            winner.study.train,
            epochs=effort.epochs,
            data_fraction=effort.fraction,
            lr_scale=winner.study.train.lr_scale * scale,
        )
        name = f"{winner.name} in full" + ("" if scale == 1 else f", learning rate x{scale:.2g}")
        finalist = dataclasses.replace(winner, name=name, study=dataclasses.replace(winner.study, train=train))
        entry = runner.train(finalist.study, finalist.allocation, label=name, stage="search")
        ran.append((finalist, entry))
    return sorted(ran, key=lambda one: runner.rank(one[0].study, one[1].outcome), reverse=True)
