"""What an option's step does to memorisation: the second currency beside its gain."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from autopeft.core.scores import Evidence, TensorEvidence

__all__ = ["Gains", "memory_changes"]

Gains = Callable[["Evidence"], Sequence[float]]
"""The energies that the sizes of a method capture at a site of the evidence's signal."""

_STEP = 1e-6
"""Distance of the one-sided differences, as a share of the signal's norm, where a subspace moves with it."""

_APART = 1e-2
"""Share by which the two one-sided slopes differ where something has jumped between their ends."""


def memory_changes(gains: Gains, evidence: Evidence, source: str, *, fixed: bool = False) -> tuple[float, ...] | None:
    """How much memorisation changes to first order by the step behind each gain; below 0 where it is less.

    With s the signal and t the evidence's `memory`, an option that captures the energy `E(s) = s^T P(s) s`, P(s) the
    projection on its subspace, makes a step of `-P(s) s` and changes a measure with gradient t by

        dM = -s^T P(s) t = -(E(s + h t) - E(s - h t)) / (4 h)

    with P(s) in both energies: polarisation. Where P is the projection that captures most (leading singular vectors) it
    is stationary at s, so that the slope of `E` itself is that with P held fixed (Danskin, "The Theory of Max-Min",
    1967): h is small, in float64, and no method has to say what its subspace is. Entries are chosen by the `score`,
    which stays as it is. A large h, or a subspace of s + t, would give the polarisation of something else. Where a
    choice made by the signal flips on one side of s (S2FT draws by it), the slope of the other side counts. Methods
    whose subspace follows s smoothly and is not the best one (FacT, FLoRA) have its turn counted as well.

    For `gap`, t is what the halves' signals differ by. Along their mean the gap of the losses changes by half the
    difference of their energies, whose mean is zero, since the halves are exchangeable. What training memorises shows
    when it sees one half alone: with `s_A = s + t/2` and `s_C = s - t/2`, a step on A opens the gap
    `L_C - L_A` by `s_A^T P(s_A) (s_A - s_C)`. The result is the mean of that and the same with A and C exchanged, and
    each half chooses its own subspace, entries too.

    Args:
        gains: `Method.gains` of a method at the site, for some sizes.
        evidence: what is known about the site.
        source: what the evidence's `memory` is about; see `ScoreOrigin.memory`.
        fixed: whether the subspaces do not depend on the signal and energies are found by an iteration, so that h = 1
            is exact and a small one is not.

    Returns:
        One number per size, in units of the measure for steps in the units of the gains; None where nothing about
        memorisation was measured.
    """
    if all(known.memory is None for known in _tensors(evidence)):
        return None
    if source == "gap":
        one, other = (_slopes(gains, _moved(evidence, share, ranked=True), fixed) for share in (0.5, -0.5))
        return tuple((a - c) / 2 for a, c in zip(one, other, strict=True))
    return tuple(-slope for slope in _slopes(gains, _moved(evidence, 0.0), fixed))


def _slopes(gains: Gains, evidence: Evidence, fixed: bool) -> tuple[float, ...]:
    """`s^T P(s) t` of every size, of evidence in float64."""
    known = [k for k in _tensors(evidence) if k.memory is not None]
    s, t = _norm(k.signal for k in known), _norm(k.memory for k in known if k.memory is not None)
    here = gains(evidence)
    if not (s > 0 and t > 0):
        return (0.0,) * len(here)
    h = (1.0 if fixed else _STEP) * s / t
    above, below = (gains(_moved(evidence, step)) for step in (h, -h))
    if fixed:
        return tuple((a - b) / (4 * h) for a, b in zip(above, below, strict=True))
    return tuple(_slope((a - e) / (2 * h), (e - b) / (2 * h)) for a, e, b in zip(above, here, below, strict=True))


def _slope(above: float, below: float) -> float:
    """The mean of two one-sided slopes, or the smaller where one of them leads over a jump."""
    apart = abs(above - below) > _APART * max(abs(above), abs(below))
    return min(above, below, key=abs) if apart else (above + below) / 2


def _moved(evidence: Evidence, step: float, *, ranked: bool = False) -> Evidence:
    """The evidence with `step` times the memory added to the signal, in float64, and entries ranked by it on demand."""

    def one(known: TensorEvidence) -> TensorEvidence:
        signal = known.signal.double()
        if known.memory is not None:
            signal = signal + step * known.memory.double()
        return replace(known, signal=signal, score=signal.square() if ranked else known.score)

    return replace(
        evidence,
        slots={slot: one(known) for slot, known in evidence.slots.items()},
        members={name: _moved(member, step, ranked=ranked) for name, member in evidence.members.items()},
    )


def _tensors(evidence: Evidence) -> list[TensorEvidence]:
    return [*evidence.slots.values(), *(known for member in evidence.members.values() for known in _tensors(member))]


def _norm(tensors: Iterable[Tensor]) -> float:
    # Without torch by name: whoever reads a study imports this module, and must not wait for it.
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))
