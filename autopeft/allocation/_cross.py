"""Choosing on one half of the data and valuing on the other."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from autopeft.core.scores import Evidence, TensorEvidence

__all__ = ["cross_valued"]


def cross_valued(evidence: Evidence) -> Evidence:
    """The same evidence with entries ranked by the first half's gradient and valued by the second's.

    A half knows less than the whole and its gradient is larger by its noise, so it is scaled to the signal's energy.
    Slots without halves stay as they are.
    """
    return replace(
        evidence,
        slots={slot: _crossed(known) for slot, known in evidence.slots.items()},
        members={name: cross_valued(member) for name, member in evidence.members.items()},
    )


def _crossed(known: TensorEvidence) -> TensorEvidence:
    if known.half_a is None or known.half_c is None:
        return known
    whole, half = _norm(known.signal), _norm(known.half_c)
    return replace(known, score=known.half_a.square(), signal=known.half_c * (whole / half if half > 0 else 0.0))


def _norm(tensor: Tensor) -> float:
    # Without torch by name: whoever reads a study imports this module, and must not wait for it.
    return float(tensor.double().norm())
