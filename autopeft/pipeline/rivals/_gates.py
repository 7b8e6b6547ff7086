"""Binary-concrete gates whose expected cost is the budget at every step."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["open_probabilities", "sample"]

_HALVINGS = 200


def open_probabilities(alpha: Tensor, costs: Tensor, limit: float, temperature: float = 1.0) -> Tensor:
    """`p_i = sigmoid((alpha_i - b) / temperature)`, with the shift b for which `sum p_i c_i` is the limit.

    S3Delta (Hu et al., 2022, arXiv 2206.07382, section 3.3). b is found by bisection; gradients flow through it by
    the implicit function theorem, `db / dalpha_i = c_i p_i' / sum c_j p_j'`, where the released code normalises.

    Args:
        alpha: float64 of shape (n,), with or without gradient.
        costs: float64 of shape (n,), above 0.
        limit: the budget. Where everything fits, all gates are open.
        temperature: of the gates, above 0.
    """
    if float(costs.sum()) <= limit:
        return torch.ones_like(alpha) + 0.0 * alpha
    fixed = alpha.detach()
    spread = temperature * 60.0
    low, high = float(fixed.min()) - spread, float(fixed.max()) + spread
    for _ in range(_HALVINGS):
        middle = 0.5 * (low + high)
        if float((torch.sigmoid((fixed - middle) / temperature) * costs).sum()) > limit:
            low = middle
        else:
            high = middle
    shift = 0.5 * (low + high)
    at = torch.sigmoid((fixed - shift) / temperature)
    slope = (costs * at * (1 - at)).sum() / temperature
    excess = (costs * torch.sigmoid((alpha - shift) / temperature)).sum() - limit
    # One Newton step: of no size, as the excess is zero here, but with the derivative of the root.
    moved = shift + excess / slope.clamp_min(torch.finfo(alpha.dtype).tiny)
    return torch.sigmoid((alpha - moved) / temperature)


def sample(p: Tensor, generator: torch.Generator, temperature: float = 1.0) -> Tensor:
    """Relaxed Bernoulli draws (binary concrete; Maddison et al., 2017, arXiv 1611.00712, appendix B).

    `z = sigmoid((logit(p) + logit(u)) / temperature)` with u uniform; P(z > 1/2) = p.

    Args:
        p: probabilities, shape (n,).
        generator: CPU generator.
        temperature: the lower, the nearer to 0 or 1.
    """
    tiny = 1e-6
    u = torch.rand(p.shape, generator=generator, dtype=p.dtype).clamp(tiny, 1 - tiny)
    return torch.sigmoid((torch.logit(p.clamp(tiny, 1 - tiny)) + torch.logit(u)) / temperature)
