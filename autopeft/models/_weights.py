"""Weights from a file into a model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from autopeft.errors import UsageError
from autopeft.models._head import head_paths

__all__ = ["load_weights", "read_tensors"]

_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
"""Keys that training programs put the tensors under; averaged weights first."""

_SHOWN = 5


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, on the CPU: safetensors, or what `torch.save` wrote, read without running any code.

    Raises:
        UsageError: when the file is absent, unreadable or holds no tensors by name.
    """
    if not path.is_file():
        raise UsageError(f"there is no file of weights at {str(path)!r}; give a .safetensors or .pth file")
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        data: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the reader of damaged pickles raises whatever the damage leads it to
        reason = str(error).strip().split("\n", 1)[0]
        raise UsageError(
            f"the weights in {str(path)!r} cannot be read ({reason}); give a .safetensors file, or a .pth file that "
            "holds nothing but tensors"
        ) from error
    for key in _WRAPPERS:
        if isinstance(data, Mapping) and isinstance(data.get(key), Mapping):
            data = data[key]
            break
    if not isinstance(data, Mapping) or not all(isinstance(v, Tensor) for v in data.values()) or not data:
        raise UsageError(f"{str(path)!r} holds no tensors by name; give a file of a model's state dict")
    return {str(name).removeprefix("module."): tensor for name, tensor in data.items()}


def load_weights(model: nn.Module, path: Path) -> None:
    """Put the tensors of a file into a model, all of them except a classifier that does not fit.

    timm's own filter for the architecture runs first: it renames the tensors of other publishers and resizes position
    embeddings to the model's image size.

    Raises:
        UsageError: when tensors are missing, unexpected or of another shape; the model is then as before.
    """
    tensors = _filtered(model, read_tensors(path))
    heads = tuple(f"{name}." for name in {*head_paths(model), *_declared(model)})
    own = model.state_dict()
    for name in [n for n in tensors if n.startswith(heads)]:
        if name not in own or own[name].shape != tensors[name].shape:
            del tensors[name]
    missing = [n for n in own if n not in tensors and not n.startswith(heads) and not n.endswith("num_batches_tracked")]
    unexpected = [n for n in tensors if n not in own]
    misshapen = [
        f"{n} {tuple(tensors[n].shape)} instead of {tuple(own[n].shape)}"
        for n in tensors
        if n in own and own[n].shape != tensors[n].shape
    ]
    problems = [
        f"{len(names)} {what} ({', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''})"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
        if names
    ]
    if problems:
        raise UsageError(
            f"the weights in {str(path)!r} are not those of {type(model).__name__} as built: tensors "
            f"{'; '.join(problems)}. Check the model's name, image size and arguments"
        )
    model.load_state_dict(tensors, strict=False)


def _declared(model: nn.Module) -> tuple[str, ...]:
    """The classifier's names in timm's configuration, also when the model was built without one."""
    config = getattr(model, "pretrained_cfg", None) or {}
    names = config.get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def _filtered(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors after timm's filter for the model's architecture, which lives in the module that defines it."""
    home = sys.modules.get(type(model).__module__)
    names = [n for n in vars(home or object) if n.endswith("checkpoint_filter_fn")]
    name = "checkpoint_filter_fn" if "checkpoint_filter_fn" in names else next(iter(names), "")
    function: Callable[..., dict[str, Tensor]] | None = getattr(home, name, None) if name else None
    if function is None:
        return tensors
    try:
        return dict(function(dict(tensors), model))
    except (KeyError, RuntimeError, ValueError, AttributeError, IndexError):
        # Tensors of another architecture: the comparison of names that follows says so in plain words.
        return tensors
