"""One call of a denoiser, whichever of diffusers' signatures it has."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from autopeft.errors import UsageError

__all__ = ["denoise", "label_rows"]


def denoise(
    model: nn.Module, noisy: Tensor, timesteps: Tensor, labels: Tensor | None = None, text: Tensor | None = None
) -> Tensor:
    """The model's output for noisy images, (b, C, H, W), in float32; in float64 where the model computes in that.

    Args:
        model: a U-Net or transformer of diffusers, or a module of that signature.
        noisy: (b, C, H, W).
        timesteps: (b,), int64.
        labels: (b,), int64; passed on to a model that is told a class.
        text: encoded captions (b, length, width); passed on to a model that takes some.

    Raises:
        UsageError: when a label has no row in the model's table, or texts are missing.
    """
    taken = inspect.signature(type(model).forward).parameters
    given: dict[str, Any] = {"timestep": timesteps}
    if "timestep" not in taken:
        raise UsageError(f"{type(model).__name__} takes no timestep; task diffusion trains denoisers (diffusers:...)")
    rows = label_rows(model)
    if rows and labels is not None:
        if int(labels.max()) >= rows:
            raise UsageError(
                f"the model has {rows} labels and none for no class; set task.label_dropout=0, and no guidance"
            )
        given["class_labels"] = labels
    if "encoder_hidden_states" in taken and text is not None:
        given["encoder_hidden_states"] = text
    if "added_cond_kwargs" in taken and "caption_channels" in getattr(model, "config", {}):
        given["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
    if "return_dict" in taken:
        given["return_dict"] = False
    output = model(noisy, **given)
    output = output[0] if isinstance(output, tuple) else getattr(output, "sample", output)
    if not isinstance(output, Tensor) or output.shape[0] != len(noisy) or output.shape[1] < noisy.shape[1]:
        found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise UsageError(f"a denoiser gives one image of shape {tuple(noisy.shape)} per image, this one gave {found}")
    # Further channels are a learned variance, which the mean squared error does not train.
    return output[:, : noisy.shape[1]].to(torch.promote_types(output.dtype, torch.float32))


def label_rows(model: nn.Module) -> int:
    """Labels that the model knows, 0 when it is not told a class."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in ("class_embedding", "class_embedder"):
            table = getattr(module, "embedding_table", module)
            if isinstance(table, nn.Embedding):
                return table.num_embeddings
    return 0
