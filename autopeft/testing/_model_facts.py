"""Everything about a model that an insertion must give back."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

__all__ = ["differences", "facts"]


def facts(model: nn.Module) -> dict[str, Any]:
    """Identity, order, class, attributes, flags, mode and values of everything in a model, by a readable name."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        found[f"{path}: object"] = id(module)
        found[f"{path}: class"] = type(module)
        found[f"{path}: mode"] = module.training
        found[f"{path}: attributes"] = [(k, id(v)) for k, v in vars(module).items() if k != "training"]
        found[f"{path}: attribute order"] = list(vars(module))
        for kind in ("_parameters", "_buffers", "_modules"):
            found[f"{path}: {kind}"] = [(k, id(v)) for k, v in getattr(module, kind).items()]
        for kind in [k for k in vars(module) if k.endswith("_hooks")]:
            found[f"{path}: {kind}"] = list(getattr(module, kind))
    for name, parameter in model.named_parameters():
        found[f"{name}: flag"] = parameter.requires_grad
        found[f"{name}: gradient"] = parameter.grad
    for name, tensor in model.state_dict(keep_vars=True).items():
        found[f"{name}: value"] = tensor.detach().clone()
    found["state dict order"] = list(model.state_dict())
    return found


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The names of the facts that differ."""
    return [key for key in {**before, **after} if not _same(before.get(key), after.get(key))]


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return bool(one == other) if not isinstance(one, torch.Tensor) else one is other
