"""Figures of merit of a classifier, from its logits."""

from __future__ import annotations

import torch
from torch import Tensor

from autopeft.core.temperature import temperature_of
from autopeft.errors import UsageError

__all__ = [
    "ECE_BINS",
    "classification_metrics",
    "expected_calibration_error",
    "macro_f1",
    "mean_nll",
    "scaled_nll",
    "top1",
]

ECE_BINS = 15
"""Bins of the calibration error, as in Guo et al. 2017."""


def _check(logits: Tensor, labels: Tensor) -> None:
    if logits.ndim != 2 or labels.ndim != 1 or logits.shape[0] != labels.shape[0] or not logits.shape[0]:
        raise UsageError(
            "metrics need logits of shape (n, classes) and labels of shape (n,) with n of at least 1; "
            f"got {tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= logits.shape[1]:
        raise UsageError(f"labels must lie in 0..{logits.shape[1] - 1}, found {low if low < 0 else high}")


def top1(logits: Tensor, labels: Tensor) -> float:
    """Share of samples whose largest logit is the label's; ties go to the lowest class.

    Args:
        logits: shape (n, classes).
        labels: shape (n,), integers.
    """
    _check(logits, labels)
    return float((logits.argmax(dim=1) == labels).double().mean())


def macro_f1(logits: Tensor, labels: Tensor) -> float:
    """Unweighted mean over classes of F1 = 2 TP / (2 TP + FP + FN).

    Classes that are neither among the labels nor among the predictions do not count.

    Args:
        logits: shape (n, classes).
        labels: shape (n,), integers.
    """
    _check(logits, labels)
    n_classes = logits.shape[1]
    predicted = logits.argmax(dim=1)
    hits = torch.bincount(labels[predicted == labels], minlength=n_classes).double()
    seen = torch.bincount(labels, minlength=n_classes) + torch.bincount(predicted, minlength=n_classes)
    present = seen > 0
    return float((2 * hits[present] / seen[present]).mean())


def expected_calibration_error(logits: Tensor, labels: Tensor, bins: int = ECE_BINS) -> float:
    """Expected calibration error: sum over bins of `|B| / n * |accuracy(B) - confidence(B)|`.

    The confidence is the largest softmax probability; bin m of M holds confidences in `((m - 1) / M, m / M]`
    (Guo, Pleiss, Sun and Weinberger, "On Calibration of Modern Neural Networks", ICML 2017, equation 3).

    Args:
        logits: shape (n, classes).
        labels: shape (n,), integers.
        bins: number of equal-width bins M.
    """
    _check(logits, labels)
    if bins < 1:
        raise UsageError(f"the calibration error needs at least 1 bin, got {bins}")
    confidence, predicted = logits.double().softmax(dim=1).max(dim=1)
    where = (confidence * bins).ceil().long().sub_(1).clamp_(0, bins - 1)
    gap = torch.zeros(bins, dtype=torch.float64, device=logits.device)
    gap.index_add_(0, where, (predicted == labels).double() - confidence)
    return float(gap.abs().sum() / labels.shape[0])


def mean_nll(logits: Tensor, labels: Tensor) -> float:
    """Mean negative log-likelihood of the labels, in nats, without label smoothing.

    Args:
        logits: shape (n, classes).
        labels: shape (n,), integers.
    """
    _check(logits, labels)
    return float(torch.nn.functional.cross_entropy(logits.double(), labels))


def scaled_nll(logits: Tensor, labels: Tensor) -> float:
    """Mean negative log-likelihood in nats after the one temperature that makes it least on these very samples.

    Temperature scaling (Guo et al. 2017, section 4.2) takes out how sure a classifier is on the whole, and leaves what
    it knows: it is the same when all logits are multiplied by a positive number, and never above `mean_nll` or the
    logarithm of the number of classes.

    Args:
        logits: shape (n, classes).
        labels: shape (n,), integers.
    """
    _check(logits, labels)
    return temperature_of(logits.double(), labels.long())[1]


def classification_metrics(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """`top1`, `macro_f1`, `ece` (15 bins), `nll` and `scaled_nll` of one set of predictions.

    Args:
        logits: shape (n, classes).
        labels: shape (n,), integers.
    """
    return {
        "top1": top1(logits, labels),
        "macro_f1": macro_f1(logits, labels),
        "ece": expected_calibration_error(logits, labels),
        "nll": mean_nll(logits, labels),
        "scaled_nll": scaled_nll(logits, labels),
    }
