"""Denoisers, as diffusion models have them: how one is called, and where its table of labels is."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from autopeft.errors import UsageError

__all__ = ["example_call", "fit_labels", "is_denoiser", "label_paths", "takes_text"]

_TOKENS = 4
"""Length of a text in an example: attention takes any."""


def is_denoiser(model: nn.Module) -> bool:
    """Whether the model maps noisy images and timesteps to noise: its `forward` takes a `timestep` beside them."""
    taken = _taken(model)
    return "timestep" in taken and bool({"sample", "hidden_states"} & set(taken))


def example_call(model: nn.Module, images: Tensor) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Arguments with which the model runs on images.

    Args:
        model: any model.
        images: (B, C, H, W); what else a denoiser wants (timesteps, labels, texts) is zeros on the same device.

    Returns:
        Positional and keyword arguments of `forward`; the images alone for a model that is no denoiser.
    """
    if not is_denoiser(model):
        return (images,), {}
    taken, n = _taken(model), len(images)
    config = getattr(model, "config", {})
    zeros = images.new_zeros(n, dtype=torch.int64)
    given: dict[str, Any] = {"timestep": zeros}
    if "class_labels" in taken and label_paths(model):
        given["class_labels"] = zeros
    if takes_text(model):
        given["encoder_hidden_states"] = images.new_zeros(n, _TOKENS, _text_width(model))
    if "added_cond_kwargs" in taken and "caption_channels" in config:
        given["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
    if "return_dict" in taken:
        given["return_dict"] = False
    return (images,), given


def label_paths(model: nn.Module) -> tuple[str, ...]:
    """Dotted paths of a denoiser's tables of labels, in model order; none when it is not told a class.

    `class_embedding` of a U-Net, one `class_embedder` per block of a DiT. They are to it what a classifier is to an
    image model: what changes with the classes of the data.
    """
    found = []
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if last in ("class_embedding", "class_embedder") and _table(module) is not None:
            found.append(name)
    return tuple(found)


def fit_labels(model: nn.Module, num_classes: int) -> None:
    """Give a denoiser one label per class, and one for no class behind them.

    A table that has `num_classes` rows, or one more, stays. In any other, every row becomes the last one of before,
    which stands for no class where there is such a label.

    Raises:
        UsageError: when a table is of a kind that cannot be resized.
    """
    for path in label_paths(model):
        module = model.get_submodule(path)
        table = _table(module)
        assert table is not None
        if table.num_embeddings in (num_classes, num_classes + 1):
            continue
        rows = table.weight.detach()[-1:].expand(num_classes + 1, -1).clone()
        new = nn.Embedding(num_classes + 1, table.embedding_dim).to(rows.device, rows.dtype)
        with torch.no_grad():
            new.weight.copy_(rows)
        if module is table:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, new)
            continue
        if not hasattr(module, "num_classes"):
            raise UsageError(f"the labels {path!r} of {type(model).__name__} cannot be fitted to {num_classes} classes")
        module.embedding_table = new
        vars(module)["num_classes"] = num_classes


def takes_text(model: nn.Module) -> bool:
    """Whether a denoiser looks at encoded texts."""
    return "encoder_hidden_states" in _taken(model) and _text_width(model) > 0


def _taken(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(type(model).forward).parameters


def _table(module: nn.Module) -> nn.Embedding | None:
    if isinstance(module, nn.Embedding):
        return module
    table = getattr(module, "embedding_table", None)
    return table if isinstance(table, nn.Embedding) else None


def _text_width(model: nn.Module) -> int:
    """Channels of the texts that the model looks at, 0 when it looks at none."""
    config = getattr(model, "config", {})
    for key in ("encoder_hid_dim", "caption_channels", "cross_attention_dim", "joint_attention_dim"):
        width = config.get(key)
        if isinstance(width, list | tuple):
            width = width[0]
        if width:
            return int(width)
    return 0
