"""Places whose gradients on two halves of the data disagree."""

from __future__ import annotations

import torch
from torch import Tensor

from autopeft.core.scores import Scores
from autopeft.core.site import Place
from autopeft.errors import UsageError

__all__ = ["cosine", "memorising"]


def cosine(one: Tensor, two: Tensor) -> float:
    """Cosine of two tensors of one shape, in float64; 0 when one of them is zero."""
    a, b = one.detach().flatten().double(), two.detach().flatten().double()
    norms = float(torch.linalg.vector_norm(a) * torch.linalg.vector_norm(b))
    return float(torch.dot(a, b)) / norms if norms > 0 else 0.0


def memorising(scores: Scores, below: float = -0.1) -> dict[Place, float]:
    """Places where a step that helps one half of the data would hurt the other, worst first.

    The outer gain of an inner step is `g_C^T P g_A`; where it is negative, what is learned there does not carry over.
    It is noisy, so it is a flag to look at and no reason to leave a place out.

    Args:
        scores: scores that keep halves (`calibrated`; `gradient` and `fisher` with `halves=true`).
        below: cosine of the halves under which a place is listed.

    Raises:
        UsageError: when the scores keep no halves.
    """
    found: dict[Place, float] = {}
    kept = False
    for place in scores.totals:
        known = scores.evidence[place.site].get(place.slot)
        if known is None or known.half_a is None or known.half_c is None:
            continue
        kept = True
        agree = cosine(known.half_a, known.half_c)
        if agree < below:
            found[place] = agree
    if not kept:
        raise UsageError(
            f"the scores of {scores.origin.scorer} keep no halves to compare; use scorer=calibrated, or a scorer with "
            "gradient.halves=true"
        )
    return dict(sorted(found.items(), key=lambda item: (item[1], item[0])))
