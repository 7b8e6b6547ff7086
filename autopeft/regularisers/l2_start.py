"""Decay towards the pre-trained weights instead of towards zero."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from autopeft.core.contracts import Inserted, StepState, Task, Term
from autopeft.errors import UsageError
from autopeft.methods.base import Adapter
from autopeft.regularisers._changes import additive, exactly, note_nothing
from autopeft.regularisers._term import BaseTerm, check_weight

__all__ = ["L2Start", "Pull"]

Pull = Literal["square", "sign"]
"""How a change is pulled back: in proportion to it, or by the same amount whatever its size."""


@dataclass(frozen=True, slots=True)
class L2Start:
    """Adds `weight / 2 * sum of squares` of the changes of the model's tensors: L2-SP.

    Li et al., 2018, arXiv 1802.01483, equation 2, with the frozen model as the starting point; the head has no such
    point and is left to weight decay. What is penalised is the change itself, not the parameters that make it: for LoRA
    `||B A||^2`, which weight decay on B and A is not. Options that change no tensor additively (scales, bottlenecks)
    are left alone.

    The pull `sign` adds `weight * sum of magnitudes` instead, so that the gradient is `weight * sign(change)` (and 0 at
    0): small changes go to zero and can be dropped afterwards. It is AdamR's L1 form (Deng et al., 2024, arXiv
    2410.09344, section 5) as a term of the loss: here the optimizer sees it, there it is a decay beside the step.

    Attributes:
        weight: alpha of L2-SP; 0 switches it off.
        pull: `square` or `sign`.
    """

    weight: float = 1e-3
    pull: Pull = "square"

    def __post_init__(self) -> None:
        check_weight("l2_start", self.weight)
        if self.pull not in get_args(Pull):
            raise UsageError(f"l2_start: pull must be one of {', '.join(get_args(Pull))}, got {self.pull!r}")

    def begin(self, inserted: Inserted, task: Task, seed: int) -> Term:
        """Find the options that change tensors additively."""
        if not self.weight:
            return BaseTerm()
        adapters = additive(inserted)
        if not adapters:
            note_nothing("l2_start", "an additive change of a tensor")
            return BaseTerm()
        return _Distance(self, adapters)


class _Distance(BaseTerm):
    """How far the changes are from none."""

    def __init__(self, settings: L2Start, adapters: list[Adapter]) -> None:
        self._settings = settings
        self._adapters = adapters

    def add(self, state: StepState) -> Tensor | None:
        """The weighted distance."""
        sums = []
        for adapter in self._adapters:
            with exactly(next(adapter.parameters())):
                for change in adapter.delta().values():
                    sums.append(0.5 * change.square().sum() if self._settings.pull == "square" else change.abs().sum())
        return self._settings.weight * torch.stack(sums).sum()
