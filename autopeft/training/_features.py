"""What a linear probe is fitted on: the features in front of the classifier, with folds for cross-validation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from autopeft.core.contracts import Task
from autopeft.core.outcome import Split
from autopeft.core.site import Catalog
from autopeft.errors import DataError, UsageError
from autopeft.scoring.borrow import borrowed
from autopeft.training._device import check_device

__all__ = ["Features", "features_of", "folds_of"]

_OFF = "switch the warm-up of the head off with head_warmup=false"


@dataclass(frozen=True, slots=True, eq=False)
class Features:
    """Samples as the classifier sees them.

    Attributes:
        x: features in float64 on the CPU, (n, d).
        labels: int64, (n,).
        classes: number of classes.
        head: dotted path of the classifier.
        weight: the classifier's own weight, for shape and type of the result.
    """

    x: Tensor
    labels: Tensor
    classes: int
    head: str
    weight: Tensor

    @property
    def onehot(self) -> Tensor:
        """Labels as rows of the identity, float64, (n, classes)."""
        return torch.eye(self.classes, dtype=torch.float64)[self.labels]

    def state(self, weight: Tensor, bias: Tensor) -> dict[str, Tensor]:
        """State dict entries of the classifier, in its own shape and type, on the CPU."""
        return {
            f"{self.head}.weight": weight.reshape(self.weight.shape).to(self.weight.dtype),
            f"{self.head}.bias": bias.to(self.weight.dtype),
        }


def features_of(
    model: nn.Module, catalog: Catalog, task: Task, device: torch.device | str, splits: Sequence[Split]
) -> Features:
    """Run the model over splits, in evaluation mode and without augmentation, and keep what reaches the classifier.

    Raises:
        UsageError: when the classifier is not a single Linear, or 1x1 convolution, with a bias and one output per
            class, or the model is on another device.
        DataError: when the features are not finite, or alike for all samples.
    """
    check_device(model, device)
    head = _head_of(model, catalog, len(task.classes))
    caught: list[Tensor] = []
    labels: list[Tensor] = []

    def catch(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        caught.append(inputs[0].detach().flatten(1).to("cpu", torch.float64))

    handle = head.register_forward_pre_hook(catch)
    try:
        with borrowed(model), torch.no_grad():
            for split in splits:
                for images, targets in task.batches(split):
                    model(images.to(device))
                    labels.append(targets)
    finally:
        handle.remove()
    path = catalog.head[0]
    if len(caught) != len(labels) or not caught or caught[0].shape[1] != head.weight[0].numel():
        raise UsageError(f"the classifier {path!r} is not called once per batch on one vector per image; {_OFF}")
    x = torch.cat(caught)
    if not bool(torch.isfinite(x).all()):
        raise DataError(f"the features in front of {path!r} are not finite; check the weights and the images")
    if float((x - x.mean(0)).square().sum()) == 0:
        raise DataError(f"the features in front of {path!r} are alike for all {len(x)} images; check both")
    return Features(x, torch.cat(labels), len(task.classes), path, head.weight.detach().cpu())


def folds_of(labels: Tensor, folds: int, seed: int) -> Tensor:
    """Fold number of every sample, from 0: random, sizes alike within every class and in total.

    Raises:
        UsageError: when there are fewer than two folds.
        DataError: when there are fewer samples than folds.
    """
    if folds < 2:
        raise UsageError(f"cross-validation needs at least 2 folds, got {folds}")
    if len(labels) < folds:
        raise DataError(f"{len(labels)} samples are too few for {folds} folds; lower the number of folds")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    order = order[torch.sort(labels[order], stable=True).indices]
    fold = torch.empty_like(order)
    fold[order] = torch.arange(len(labels)) % folds
    return fold


def _head_of(model: nn.Module, catalog: Catalog, classes: int) -> nn.Linear | nn.Conv2d:
    if len(catalog.head) != 1:
        found = ", ".join(catalog.head) or "none"
        raise UsageError(f"a linear probe needs a model with one classifier, this one has: {found}; {_OFF}")
    head = model.get_submodule(catalog.head[0])
    if not isinstance(head, nn.Linear) and not (isinstance(head, nn.Conv2d) and head.kernel_size == (1, 1)):
        raise UsageError(
            f"a linear probe needs a Linear classifier, {catalog.head[0]!r} is a {type(head).__name__}; {_OFF}"
        )
    if head.bias is None or len(head.weight) != classes:
        raise UsageError(
            f"a linear probe needs a classifier with a bias and {classes} outputs; {catalog.head[0]!r} has "
            f"{len(head.weight)} outputs and {'no' if head.bias is None else 'a'} bias; reset it for the task"
        )
    return head
