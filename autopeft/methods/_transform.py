"""What transforming the input of a weight can capture of a signal, to first order."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["project_on_transforms"]

_RELATIVE = 1e-10
"""Directions whose eigenvalue is below this times the largest are not told from rounding."""


def project_on_transforms(value: Tensor, signal: Tensor, factors: Sequence[int]) -> tuple[float, Tensor]:
    """Projection of a signal on `{W dT}`, dT the sum over modes of `I x ... x X_i x ... x I` with any X_i (d_i, d_i).

    That is the tangent space at the identity of Kronecker products, and of tensor-ring matrices of any rank. It has
    `sum of d_i^2` dimensions or, since scaling belongs to every mode, N - 1 less. With g the inner products of the
    signal with the spanning changes and H those of the changes with each other, the squared norm is `g^T H^+ g`; both
    are made from W's unfoldings, the changes themselves never are.

    Args:
        value: W, of any rank >= 2, flattened to (out, in).
        signal: of W's shape.
        factors: d_1, ..., d_N with product in.

    Returns:
        The squared norm, and the signal less its projection, (out, in), float64.
    """
    weight, target = (t.detach().flatten(1).to("cpu", torch.float64) for t in (value, signal))
    shape = (len(weight), *factors)
    w, s = weight.reshape(shape), target.reshape(shape)
    modes = range(1, len(shape))
    inner = torch.cat([(_unfold(w, i).T @ _unfold(s, i)).flatten() for i in modes])
    gram = torch.cat([torch.cat([_block(w, i, j) for j in modes], 1) for i in modes])
    values, vectors = torch.linalg.eigh(gram)
    usable = values > _RELATIVE * values[-1]
    along = vectors.T @ inner
    held = torch.where(usable, along.square() / torch.where(usable, values, 1.0), 0.0)
    best = vectors @ torch.where(usable, along / torch.where(usable, values, 1.0), 0.0)
    rest = s.clone()
    start = 0
    for i in modes:
        n = shape[i]
        step = best[start : start + n * n].view(n, n)
        rest -= torch.tensordot(w, step, ([i], [0])).movedim(-1, i)
        start += n * n
    return float(held.sum()), rest.reshape(len(weight), math.prod(factors))


def _unfold(tensor: Tensor, *modes: int) -> Tensor:
    """All other modes as rows, these as columns."""
    last = range(-len(modes), 0)
    return tensor.movedim(modes, tuple(last)).flatten(-len(modes)).flatten(0, -2)


def _block(w: Tensor, i: int, j: int) -> Tensor:
    """Inner products of the changes of mode i with those of mode j, (d_i^2, d_j^2).

    The change (i, a, b) puts what W has at index a of mode i at index b.
    """
    if i == j:
        matrix = _unfold(w, i)
        return torch.kron(matrix.T @ matrix, torch.eye(w.shape[i], dtype=w.dtype))
    matrix = _unfold(w, i, j)
    n, m = w.shape[i], w.shape[j]
    pairs = (matrix.T @ matrix).view(n, m, n, m)  # [a, b', b, a']
    return pairs.permute(0, 2, 3, 1).reshape(n * n, m * m)
