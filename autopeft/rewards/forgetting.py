"""What the model has forgotten of another data set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import timm.data
import torch
from torch import Tensor, nn

from autopeft.core.contracts import Task, TaskSpec
from autopeft.errors import UsageError
from autopeft.rewards._measured import Measured
from autopeft.rewards._pick import Direction
from autopeft.rewards._studio import Studio, borrowed

if TYPE_CHECKING:
    from autopeft.core.outcome import Split

__all__ = ["Forgetting"]


@dataclass(frozen=True, slots=True)
class Forgetting(Measured):
    """Error on a source data set that the model was good at before it was fine-tuned.

    A fine-tuned classifier has another head, so its features are asked: each image of the source's outer split goes to
    the class whose mean feature over the source's inner split is nearest by cosine, both taken with the adapted model.
    The number is the share that goes to a wrong class; no weight is fitted. A model without a classifier, such as a
    denoiser, is measured by the mean of the source task's own loss. What the model scored before fine-tuning is a
    constant of the search and is not subtracted.

    Attributes:
        source: the data, as `data.spec` writes it.
        task: the kind of task that opens it.
        max_samples: at most this many samples of the source.
        seed: of the source's splits.
        download: whether absent data may be fetched.
    """

    source: str
    task: TaskSpec = field(metadata={"plugin": "tasks"})
    max_samples: int = 512
    seed: int = 0
    download: bool = False

    direction: ClassVar[Direction] = "minimize"

    def __post_init__(self) -> None:
        if not self.source.strip():
            raise UsageError("source of forgetting is empty; name the data that must not be forgotten")
        if self.max_samples < 2:
            raise UsageError(f"max_samples of forgetting must be at least 2, got {self.max_samples}")

    @property
    def metric(self) -> str:
        """`forgetting`."""
        return "forgetting"

    def look(self, studio: Studio) -> Mapping[str, float]:
        """As the class says."""
        model, head = studio.model, _head(studio.model)
        options = {"batch_size": 64, "max_samples": self.max_samples, "download": self.download}
        # Nothing is written: the source's splits follow from the seed.
        source = self.task.open(self.source, _preprocessing(studio), None, self.seed, options)
        with borrowed(model):
            if head is None:
                losses = torch.cat([source.losses(model, batch).float().cpu() for batch in source.batches("outer")])
                return {"forgetting": float(losses.mean())}
            known, labels = _features(model, head, source, "inner")
            asked, truth = _features(model, head, source, "outer")
        classes = torch.tensor(sorted(set(labels.tolist())))
        means = nn.functional.normalize(torch.stack([known[labels == c].mean(0) for c in classes]), dim=1)
        found = classes[(nn.functional.normalize(asked, dim=1) @ means.T).argmax(dim=1)]
        return {"forgetting": float((found != truth).double().mean())}


def _preprocessing(studio: Studio) -> Mapping[str, Any]:
    """What the task was opened with, where it says so; else timm's answer for the model."""
    known: Mapping[str, Any] | None = getattr(studio.task, "data_config", None)
    return known if known is not None else timm.data.resolve_model_data_config(studio.model)


def _head(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_classifier", None)
    found = getter() if getter is not None else None
    if found is None:
        last = [m for m in model.children() if any(True for _ in m.parameters())][-1:]
        found = last[0] if last and isinstance(last[0], nn.Linear) else None
    return found if isinstance(found, nn.Module) else None


def _features(model: nn.Module, head: nn.Module, source: Task, split: Split) -> tuple[Tensor, Tensor]:
    """What the classifier is given for each sample of a split, (n, d), and the labels (n,)."""
    kept: list[Tensor] = []
    labels: list[Tensor] = []
    device = next(model.parameters()).device
    handle = head.register_forward_pre_hook(lambda _, args: kept.append(args[0].detach().double().cpu()))
    try:
        for images, target in source.batches(split):
            model(images.to(device))
            labels.append(target)
    finally:
        handle.remove()
    return torch.cat(kept).flatten(1), torch.cat(labels)
