"""Empirical Bayes: what a tensor's gradient energy is, when most of what was measured is noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Noisy", "shrink"]

_ROUNDS = 20


@dataclass(frozen=True, slots=True)
class Noisy:
    """What was measured of one tensor.

    Attributes:
        energy: U, unbiased and noisy.
        variance: of U; infinite when it says nothing.
        fisher: trace of F, what U is expected to be proportional to; positive.
    """

    energy: float
    variance: float
    fisher: float


def shrink(measured: Sequence[Noisy], floor: float) -> tuple[list[float], float]:
    """Weights w of the measured energies against the prior `tau * fisher`, and tau.

    The shares `U / fisher` of one family of tensors scatter about tau with a variance nu^2 of their own, plus their
    noise `v = variance / fisher^2`: `w = nu^2 / (nu^2 + v)`, the posterior mean of a normal prior (Efron and Morris,
    1973). nu^2 and tau follow from each other by the method of moments, weighted by precision (DerSimonian and Laird,
    1986), until they stand still. Where the scatter is no more than the noise, w is 0 and the prior rules.

    Args:
        measured: the tensors of one family.
        floor: the smallest tau: what noise alone leaves in the squared mean gradient, per unit of F. Gradients taken at
            a head that has seen the samples disagree by construction, and U says nothing then.

    Returns:
        A weight in [0, 1] per tensor, and tau.
    """
    share = np.array([m.energy / m.fisher for m in measured])
    noise = np.array([m.variance / m.fisher**2 for m in measured])
    usable = np.isfinite(noise) & np.isfinite(share)
    if usable.sum() < 2:
        return [0.0] * len(measured), floor
    own = 0.0
    # A variance of exactly zero is that of a few equal batches; it must not outweigh everything.
    noise = np.maximum(noise, np.finfo(np.float64).eps * max(float((share[usable] ** 2).max()), 1e-100))
    x, v = share[usable], noise[usable]
    for _ in range(_ROUNDS):
        precision = 1 / (own + v)
        tau = float((precision * x).sum() / precision.sum())
        spread = (precision * (x - tau) ** 2).sum() - (precision * v).sum() + (precision**2 * v).sum() / precision.sum()
        step = float(spread / (precision.sum() - (precision**2).sum() / precision.sum()))
        before, own = own, max(0.0, step) if math.isfinite(step) else 0.0
        if abs(own - before) <= 1e-9 * max(own, before):
            break
    weights = [own / (own + n) if ok and own > 0 else 0.0 for n, ok in zip(noise, usable, strict=True)]
    return [float(w) for w in weights], max(tau, floor)
