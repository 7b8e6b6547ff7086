"""Linear probes: the classifier fitted on frozen features, by ridge regression or to convergence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autopeft.core.contracts import Task
from autopeft.core.outcome import Split
from autopeft.core.site import Catalog
from autopeft.core.temperature import temperature_of
from autopeft.errors import UsageError
from autopeft.scoring.ridge import Ridge
from autopeft.training._features import Features, features_of, folds_of
from autopeft.training._logistic import logistic_path

__all__ = ["Probe", "lbfgs_probe", "ridge_probe"]

_RIDGE = tuple(10.0 ** (k / 2) for k in range(-10, 7))
_LOGISTIC = tuple(10.0**k for k in range(-5, 2))


@dataclass(frozen=True, slots=True, eq=False)
class Probe:
    """A fitted classifier.

    Attributes:
        state: state dict entries of the classifier by full name (`head.weight`, `head.bias`), on the CPU.
        alpha: the penalty that cross-validation chose, see the function that made it.
        temperature: what the logits were divided by, 1 when nothing was scaled.
        cv_accuracy: accuracy on held-out folds.
        cv_nll: mean negative log-likelihood on held-out folds, in nats.
    """

    state: Mapping[str, Tensor]
    alpha: float
    temperature: float
    cv_accuracy: float
    cv_nll: float


def ridge_probe(
    model: nn.Module,
    catalog: Catalog,
    task: Task,
    *,
    device: torch.device | str,
    folds: int = 5,
    alphas: Sequence[float] | None = None,
    seed: int = 0,
    splits: Sequence[Split] = ("inner",),
) -> Probe:
    """Fit the classifier by ridge regression to one-hot labels: the common start of every arm.

    Closed form in float64: `min_W,b |X W^T + b - Y|^2 + alpha |W|^2` with the intercept free. Held-out folds choose
    alpha, and the temperature that turns the regression into a softmax, both by negative log-likelihood; then all
    samples give W. The temperature sees targets smoothed by 1 / (n + 2) (Platt 1999, section 2.2), so that a task the
    probe solves leaves a head with gradients. The result is fast, unique and the same on every machine up to rounding.

    Args:
        model: the model, on its device; left as it was found.
        catalog: its catalogue, for the place of the classifier.
        task: the task.
        device: where the model lies.
        folds: folds of the cross-validation, stratified by class.
        alphas: penalties to try, as multiples of the mean eigenvalue of the centred `X^T X`; the result names the
            absolute one. Half decades from 1e-5 to 1e3 when None.
        seed: of the folds.
        splits: what to fit on.

    Raises:
        UsageError: when the classifier is not a single Linear with bias, or a penalty is not positive.
        DataError: when there are fewer samples than folds, or the features are useless.
    """
    data = features_of(model, catalog, task, device, splits)
    fold = folds_of(data.labels, folds, seed)
    centred = data.x - data.x.mean(0)
    unit = float(centred.square().sum()) / data.x.shape[1]
    penalties = [a * unit for a in _checked(alphas, _RIDGE)]
    parts = [Ridge(data.x[fold != k], data.onehot[fold != k]) for k in range(folds)]
    best: Probe | None = None
    for alpha in penalties:
        held_out = torch.empty(len(fold), data.classes, dtype=torch.float64)
        for k, part in enumerate(parts):
            weight, bias = part.solve(alpha)
            held_out[fold == k] = data.x[fold == k] @ weight.T + bias
        temperature, nll = temperature_of(held_out, data.labels, 1 / (len(fold) + 2))
        if best is None or nll < best.cv_nll:
            best = Probe({}, alpha, temperature, _accuracy(held_out, data), nll)
    assert best is not None
    weight, bias = Ridge(data.x, data.onehot).solve(best.alpha)
    state = data.state(weight / best.temperature, bias / best.temperature)
    return Probe(state, best.alpha, best.temperature, best.cv_accuracy, best.cv_nll)


def lbfgs_probe(
    model: nn.Module,
    catalog: Catalog,
    task: Task,
    *,
    device: torch.device | str,
    folds: int = 5,
    alphas: Sequence[float] | None = None,
    seed: int = 0,
    splits: Sequence[Split] = ("inner",),
) -> Probe:
    """Fit the classifier by logistic regression, converged and with a tuned penalty: the baseline "head only".

    `min_W,b mean NLL + alpha / 2 |W|^2` with the intercept free, by L-BFGS in float64 until the gradient vanishes;
    scikit-learn's `C` is `1 / (n alpha)`. Held-out folds choose alpha by negative log-likelihood.

    Args:
        model: the model, on its device; left as it was found.
        catalog: its catalogue, for the place of the classifier.
        task: the task.
        device: where the model lies.
        folds: folds of the cross-validation, stratified by class.
        alphas: penalties to try, as multiples of the mean variance of a feature; the result names the absolute one.
            Decades from 1e-5 to 10 when None.
        seed: of the folds.
        splits: what to fit on.

    Raises:
        UsageError: when the classifier is not a single Linear with bias, or a penalty is not positive.
        DataError: when there are fewer samples than folds, or the features are useless.
        TrainingFailed: when L-BFGS does not converge.
    """
    data = features_of(model, catalog, task, device, splits)
    fold = folds_of(data.labels, folds, seed)
    unit = float(data.x.var(0, correction=0).mean())
    penalties = [a * unit for a in _checked(alphas, _LOGISTIC)]
    held_out = {alpha: torch.empty(len(fold), data.classes, dtype=torch.float64) for alpha in penalties}
    for k in range(folds):
        for alpha, weight, bias in logistic_path(data.x[fold != k], data.onehot[fold != k], penalties):
            held_out[alpha][fold == k] = data.x[fold == k] @ weight.T + bias
    cross_entropy = torch.nn.functional.cross_entropy
    losses = {alpha: float(cross_entropy(logits, data.labels)) for alpha, logits in held_out.items()}
    alpha = min(penalties, key=lambda a: losses[a])
    stronger = [a for a in penalties if a >= alpha]
    *_, (_, weight, bias) = logistic_path(data.x, data.onehot, stronger)
    return Probe(data.state(weight, bias), alpha, 1.0, _accuracy(held_out[alpha], data), losses[alpha])


def _checked(alphas: Sequence[float] | None, default: Sequence[float]) -> Sequence[float]:
    chosen = default if alphas is None else alphas
    bad = [a for a in chosen if not (math.isfinite(a) and a > 0)]
    if bad or not chosen:
        raise UsageError(f"the penalties of a probe must be positive and finite, got {list(chosen)}")
    return chosen


def _accuracy(logits: Tensor, data: Features) -> float:
    return float((logits.argmax(1) == data.labels).double().mean())
