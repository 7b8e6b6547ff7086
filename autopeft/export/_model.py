"""What exporters ask of a borrowed model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import timm
from torch import Tensor, nn

from autopeft.core.contracts import Inserted
from autopeft.methods.base import Adapter, Shared

__all__ = [
    "States",
    "adapters_of",
    "classifier_modules",
    "listed",
    "not_mergeable",
    "not_timm",
    "pretrained_config",
    "states_of",
    "tensor_names",
    "trained_statistics",
]

_MOST_REASONS = 4
_STATISTICS = re.compile(r"^buffer/.*/batch_norm/[^/]+$")


@dataclass(frozen=True, slots=True, eq=False)
class States:
    """A plan as two state dicts of the plain model, on the CPU.

    Attributes:
        base: the model as it was borrowed, with the trained classifier.
        merged: the model with every adapter merged, and the trained classifier.
        classifier: names of the classifier's tensors.
    """

    base: Mapping[str, Tensor]
    merged: Mapping[str, Tensor]
    classifier: tuple[str, ...]


def states_of(inserted: Inserted) -> States:
    """Base and merged state of a borrowed model.

    Raises:
        ExportError: naming the options that cannot be merged.
    """
    merged = inserted.merged_state()
    present = inserted.model.state_dict()
    base = {name: present[name].detach().to("cpu", copy=True) for name in merged}
    classifier = tuple(n.removeprefix("head/") for n in inserted.state() if n.startswith("head/"))
    return States(base, merged, classifier)


def adapters_of(inserted: Inserted) -> dict[str, Adapter]:
    """Option key to adapter; the members of an option on several sites under their own names."""
    found: dict[str, Adapter] = {}
    for key, part in inserted.named_adapters().items():
        if isinstance(part, Adapter):
            found[key] = part
        elif isinstance(part, Shared):
            found |= {f"{key} at {adapter.site.name}": adapter for adapter in part.adapters()}
    return found


def not_mergeable(inserted: Inserted) -> str:
    """Which options cannot be merged into the plain model and why; empty when all can."""
    return listed([f"{key}: {a.obstacle}" for key, a in adapters_of(inserted).items() if a.obstacle], "; ")


def listed(reasons: Sequence[str], separator: str = ", ") -> str:
    """The first few of many reasons, and how many more there are."""
    shown = separator.join(reasons[:_MOST_REASONS])
    left = len(reasons) - _MOST_REASONS
    return f"{shown}{separator}and {left} more" if left > 0 else shown


def not_timm(model: nn.Module) -> str:
    """Why timm could not rebuild the model from its name; empty when it can."""
    name = pretrained_config(model).get("architecture")
    if name and timm.is_model(name):
        return ""
    return f"{type(model).__name__} is no registered architecture of timm, so no other program could rebuild it"


def pretrained_config(model: nn.Module) -> dict[str, Any]:
    """The configuration timm gave a model; empty for models of others."""
    config = getattr(model, "pretrained_cfg", None)
    return dict(config) if isinstance(config, Mapping) else dict(vars(config)) if config is not None else {}


def trained_statistics(inserted: Inserted) -> tuple[str, ...]:
    """Names of the BatchNorm statistics that followed the training data, as the model's state dict calls them."""
    names = (name for name in inserted.state() if _STATISTICS.match(name))
    return tuple(name.removeprefix("buffer/").replace("/batch_norm/", ".") for name in names)


def classifier_modules(inserted: Inserted) -> tuple[str, ...]:
    """Dotted paths of the modules that hold the classifier's tensors."""
    names = (n.removeprefix("head/") for n in inserted.state() if n.startswith("head/"))
    return tuple(dict.fromkeys(name.rpartition(".")[0] for name in names))


def tensor_names(adapter: Adapter) -> tuple[str, ...]:
    """Names, in the model's state dict, of the tensors that merging an adapter changes."""
    site = adapter.site
    if site.kind in ("block", "residual"):
        return ()
    found: list[str] = []
    for slot in adapter.slots:
        found += {"bias": ["bias"], "output": [site.parameter, "bias"]}.get(slot, [site.parameter])
    return tuple(f"{site.module}.{name}" if site.module else name for name in dict.fromkeys(found))
