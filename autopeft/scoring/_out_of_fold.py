"""Classifiers that were not fitted on the samples their loss is taken of."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from autopeft.core.contracts import Task
from autopeft.core.site import Catalog
from autopeft.core.temperature import temperature_of
from autopeft.errors import DataError, UsageError
from autopeft.scoring._batches import portions
from autopeft.scoring.borrow import borrowed
from autopeft.scoring.ridge import Ridge

if TYPE_CHECKING:
    from autopeft.scoring.gradient import Gradient

__all__ = ["OutOfFold", "fit_out_of_fold"]

_PENALTIES = tuple(10.0 ** (k / 2) for k in range(-10, 7))
"""Multiples of the mean eigenvalue, as for the ridge probe."""

_OFF = "set the scorer's folds=0 to keep the head as it is"


class OutOfFold:
    """One classifier per fold; batch number b belongs to fold `b mod folds`.

    Args:
        head: the classifier.
        weights: per fold its weight and bias, in the classifier's shape, type and place.
    """

    def __init__(self, head: nn.Module, weights: Sequence[tuple[Tensor, Tensor]]) -> None:
        self._head = head
        self._weights = weights

    @contextlib.contextmanager
    def used(self, number: int) -> Iterator[None]:
        """Have the classifier that was not fitted on batch `number` in the place of the model's own."""
        slots: dict[str, Any] = self._head._parameters
        own = slots["weight"], slots["bias"]
        slots["weight"], slots["bias"] = self._weights[number % len(self._weights)]
        try:
            yield
        finally:
            slots["weight"], slots["bias"] = own


def fit_out_of_fold(
    model: nn.Module, catalog: Catalog, task: Task, settings: Gradient, seed: int, folds: int
) -> OutOfFold:
    """Fit a ridge classifier per fold on the samples of a scoring pass, the fold's own left out.

    One forward pass over the very batches that will be scored, augmentation included. Penalty and temperature, two
    numbers, are chosen as `ridge_probe` chooses them: by the likelihood of all samples under the classifier that has
    not seen them.

    Args:
        model: the model, on its device; left as it was found.
        catalog: its catalogue, for the place of the classifier.
        task: the task; its batches must be pairs of inputs and class labels.
        settings: the scoring pass.
        seed: of the pass.
        folds: folds, at least 2.

    Raises:
        DataError: when there are fewer batches than folds, or the features are useless.
        UsageError: when the classifier is not a single Linear or 1x1 convolution with a bias, or the batches hold no
            class labels.
    """
    head = _head_of(model, catalog)
    x, labels, numbers = _features(model, head, task, settings, seed)
    fold = numbers % folds
    if int(numbers.max()) + 1 < folds:
        raise DataError(f"{int(numbers.max()) + 1} batches are too few for {folds} folds; lower batch_size, or {_OFF}")
    if not bool(torch.isfinite(x).all()) or float((x - x.mean(0)).square().sum()) == 0:
        raise DataError(f"the features in front of {catalog.head[0]!r} are not finite, or alike for all; {_OFF}")
    onehot = torch.eye(len(head.weight), dtype=torch.float64)[labels]
    parts = [Ridge(x[fold != k], onehot[fold != k]) for k in range(folds)]
    unit = float((x - x.mean(0)).square().sum()) / x.shape[1]
    best: tuple[float, float, float] | None = None
    for penalty in _PENALTIES:
        logits = torch.empty(len(x), len(head.weight), dtype=torch.float64)
        for k, part in enumerate(parts):
            weight, bias = part.solve(penalty * unit)
            logits[fold == k] = x[fold == k] @ weight.T + bias
        temperature, nll = temperature_of(logits, labels, 1 / (len(x) + 2))
        if best is None or nll < best[0]:
            best = nll, penalty * unit, temperature
    assert best is not None
    weights = []
    for part in parts:
        weight, bias = (t / best[2] for t in part.solve(best[1]))
        weights.append((weight.view(head.weight.shape).to(head.weight), bias.to(head.weight)))
    return OutOfFold(head, weights)


def _features(
    model: nn.Module, head: nn.Module, task: Task, settings: Gradient, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What reaches the classifier (n, d) in float64, labels (n,) and numbers of the batches (n,), on the CPU."""
    caught: list[Tensor] = []
    labels: list[Tensor] = []
    numbers: list[Tensor] = []

    def catch(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        caught.append(inputs[0].detach().flatten(1).to("cpu", torch.float64))

    with borrowed(model), torch.no_grad(), contextlib.ExitStack() as stack:
        stack.callback(head.register_forward_pre_hook(catch).remove)
        for number, (batch, n, _) in enumerate(portions(task, settings, seed)):
            task.loss(model, batch)
            labels.append(_labels_of(batch))
            numbers.append(torch.full((n,), number))
    x = torch.cat(caught) if caught else torch.empty(0, 0)
    if len(x) != sum(map(len, labels)):
        raise UsageError(f"the classifier is not called once per batch on one vector per sample; {_OFF}")
    return x, torch.cat(labels), torch.cat(numbers)


def _labels_of(batch: Any) -> Tensor:
    pair = batch if isinstance(batch, tuple | list) and len(batch) == 2 else (None, None)
    labels = pair[1]
    if not isinstance(labels, Tensor) or labels.ndim != 1 or labels.is_floating_point():
        raise UsageError(f"out-of-fold heads need batches of inputs and class labels; {_OFF}")
    return labels.detach().cpu().long()


def _head_of(model: nn.Module, catalog: Catalog) -> nn.Linear | nn.Conv2d:
    head = model.get_submodule(catalog.head[0]) if len(catalog.head) == 1 else None
    usable = isinstance(head, nn.Linear) or (isinstance(head, nn.Conv2d) and head.kernel_size == (1, 1))
    if not usable or head is None or head.bias is None:
        found = type(head).__name__ if head is not None else ", ".join(catalog.head) or "none"
        raise UsageError(f"out-of-fold heads need one Linear classifier with a bias, this model has: {found}; {_OFF}")
    assert isinstance(head, nn.Linear | nn.Conv2d)
    return head
