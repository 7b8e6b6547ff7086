"""Semantic calibration: bringing frozen features to where the trained ones are."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["calibrated", "rotation"]


def rotation(source: Tensor, target: Tensor) -> Tensor:
    """The rotation R, determinant 1, that minimises `sum ||R (s_i - mean s) - (t_i - mean t)||^2`.

    Orthogonal Procrustes (Kabsch, 1976): with `U S V^T` the SVD of the covariance `sum (s_i - mean s)(t_i - mean t)^T`,
    `R = V D U^T`, D the identity but for its last entry, which makes the determinant 1.

    Args:
        source: rows (n, d).
        target: rows (n, d), in the same order.

    Returns:
        R of shape (d, d); rows are turned by `rows @ R.T`.
    """
    covariance = (source - source.mean(0)).T @ (target - target.mean(0))
    u, _, vh = torch.linalg.svd(covariance)
    flip = torch.ones(len(u), dtype=u.dtype, device=u.device)
    flip[-1] = torch.linalg.det(vh.T @ u.T).sign()
    turned: Tensor = (vh.T * flip) @ u.T
    return turned


def calibrated(
    trained: Tensor, frozen: Tensor, labels: Tensor, prototypes: Tensor, turn: Tensor | None = None
) -> Tensor:
    """Frozen features turned as a whole and shifted class by class, at length one (DR-Tune, section 3.3).

    A class is shifted from its mean of turned frozen features to a mean of its trained features, in which a sample
    counts by the softmax, over the class, of the cosine between its trained feature and the class's prototype: the head
    has to be sure of a sample for it to say where the class lies.

    Args:
        trained: (n, d), rows of length one.
        frozen: (n, d), rows of length one.
        labels: (n,), int64.
        prototypes: (classes, d): the head's weight.
        turn: the rotation; None for none.
    """
    moved = frozen
    if turn is not None:
        moved = (frozen - frozen.mean(0)) @ turn.T + trained.mean(0)
    # A cosine lies in [-1, 1]: its exponential needs no shift.
    sure = (trained * F.normalize(prototypes)[labels]).sum(1).exp()
    classes = len(prototypes)
    counts = torch.bincount(labels, minlength=classes).clamp_min(1).to(moved.dtype)
    old = _sums(moved, labels, classes) / counts[:, None]
    total = _sums(sure[:, None], labels, classes).clamp_min(torch.finfo(sure.dtype).tiny)
    new = _sums(trained * sure[:, None], labels, classes) / total
    return F.normalize(moved + (new - old)[labels])


def _sums(rows: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Sum of the rows of each class, (classes, d); as a product, whose order of summation is the same every time."""
    return F.one_hot(labels, classes).to(rows.dtype).T @ rows
