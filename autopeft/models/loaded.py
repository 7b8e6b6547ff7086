"""A model in memory, with what is known about it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from autopeft.core.site import Catalog
from autopeft.errors import UsageError
from autopeft.models._denoiser import fit_labels, is_denoiser
from autopeft.models._head import head_paths
from autopeft.models.scan import scan

__all__ = ["LoadedModel"]


@dataclass(slots=True)
class LoadedModel:
    """A borrowed model: on the CPU, in float32, in evaluation mode.

    Attributes:
        model: the module.
        data_config: preprocessing, with the keys of `timm.data.resolve_model_data_config`.
        name: the specification it was loaded from.
        architecture: timm's name of the architecture, or the class name of a model that timm does not know.
        model_args: arguments that, with the architecture, rebuild the module.
        pretrained_tag: tag of the weights, empty for random ones or weights from a file.
        label_names: names of the classes of the classifier that the weights came with, where known.
    """

    model: nn.Module
    data_config: dict[str, Any]
    name: str
    architecture: str
    model_args: dict[str, Any] = field(default_factory=dict)
    pretrained_tag: str = ""
    label_names: tuple[str, ...] = ()
    _hash: str = ""

    @property
    def weights_hash(self) -> str:
        """SHA-256 of the base weights and buffers, classifier left out; computed once, when first asked for."""
        if not self._hash:
            heads = tuple(path + "." for path in head_paths(self.model))
            digest = hashlib.sha256()
            for name, tensor in sorted(self.model.state_dict().items()):
                if name.startswith(heads):
                    continue
                flat = tensor.detach().cpu().contiguous()
                digest.update(f"{name} {flat.dtype} {tuple(flat.shape)}\n".encode())
                digest.update(flat.reshape(-1).view(torch.uint8).numpy())
            self._hash = digest.hexdigest()
        return self._hash

    def reset_head(self, num_classes: int, seed: int) -> Catalog:
        """Give the model a fresh classifier and list its sites.

        A denoiser gets as many labels as there are classes and one for none; one without labels stays as it is.

        Args:
            num_classes: outputs of the classifier.
            seed: seed of its weights; the caller's random state is left alone.

        Returns:
            The catalogue of the model with its new classifier.

        Raises:
            UsageError: for fewer than one class, or when the model has no classifier that could be replaced.
        """
        if num_classes < 1:
            raise UsageError(f"a classifier needs at least one class, got {num_classes}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            reset = getattr(self.model, "reset_classifier", None)
            if is_denoiser(self.model):
                fit_labels(self.model, num_classes)
            elif callable(reset):
                reset(num_classes)
            else:
                _replace_linear(self.model, num_classes)
        self.model.eval()
        return scan(self.model, self._example())

    def _example(self) -> torch.Tensor:
        return torch.zeros(1, *self.data_config["input_size"])


def _replace_linear(model: nn.Module, num_classes: int) -> None:
    """Put a fresh Linear where the classifier of a model without `reset_classifier` is."""
    paths = head_paths(model)
    old = model.get_submodule(paths[0]) if len(paths) == 1 else None
    if not isinstance(old, nn.Linear) or not paths[0]:
        raise UsageError(
            f"the classifier of {type(model).__name__} was not found: it has neither `reset_classifier(num_classes)` "
            "nor a Linear layer; give the model one of them"
        )
    parent, _, name = paths[0].rpartition(".")
    new = nn.Linear(old.in_features, num_classes, bias=old.bias is not None)
    setattr(model.get_submodule(parent), name, new.to(old.weight.device, old.weight.dtype))
