"""The temperature that turns scores into probabilities."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["temperature_of"]

_SHARPEST = 1e4
_FLATTEST = 1e-3


def temperature_of(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> tuple[float, float]:
    """The temperature that minimises the negative log-likelihood of a softmax, and that likelihood.

    The likelihood is convex in the inverse temperature s, with derivative `mean(sum_c p_c z_c - z_y)`: Newton's
    method, with bisection where a step leaves the bracket. Between 1e-4 and 1e3 for logits that are perfect or worse
    than none.

    Args:
        logits: float64, (n, classes).
        labels: int64, (n,).
        smoothing: share of the target that is spread over all classes while the temperature is chosen. Without it
            logits that are right everywhere have no best temperature, and a head that sharp has no gradient.

    Returns:
        Temperature, and mean negative log-likelihood in nats of the labels as they are.
    """
    truth = logits.gather(1, labels[:, None]).squeeze(1)
    chosen = (1 - smoothing) * truth + smoothing * logits.mean(1)
    low, high, s = _FLATTEST, _SHARPEST, 1.0
    for _ in range(100):
        p = (s * logits).softmax(1)
        mean = (p * logits).sum(1)
        slope = float((mean - chosen).mean())
        low, high = (low, s) if slope > 0 else (s, high)
        curvature = float(((p * logits.square()).sum(1) - mean.square()).mean())
        step = s - slope / curvature if curvature > 0 else s
        previous, s = s, step if low < step < high else (low * high) ** 0.5
        if abs(s - previous) <= 1e-10 * previous:
            break
    return 1 / s, float(((s * logits).logsumexp(1) - s * truth).mean())
