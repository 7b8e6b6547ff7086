"""Features of images, by any timm model."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from autopeft.errors import UsageError

__all__ = ["BUNDLED", "features"]

BUNDLED = "vit_tiny_fashion"
"""The extractor that needs no download: the vision transformer that comes with the package."""

_BATCH = 128


def features(images: Tensor, extractor: str = BUNDLED, pretrained_path: str | None = None) -> Tensor:
    """What a model's classifier would be given, for every image.

    Images are resized (bicubic, antialiased) to the size that the model was trained at, one channel is repeated to
    three and three are averaged to one where the model asks for that, and the model's mean and deviation are used.
    Values of one extractor must not be compared with those of another.

    Args:
        images: (n, C, H, W) in [-1, 1], C 1 or 3.
        extractor: name of a timm model, or `vit_tiny_fashion`.
        pretrained_path: file of its weights; None takes the ones that timm knows, from its cache or the network.

    Returns:
        float32 (n, d) on the CPU.

    Raises:
        UsageError: for an unknown model, weights that do not fit, or images of another form.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not len(images):
        raise UsageError(f"features are taken of images (n, 1 or 3, H, W), got a tensor of shape {tuple(images.shape)}")
    model, config = _extractor(extractor, pretrained_path)
    channels, *size = config["input_size"]
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))
    found = []
    with torch.no_grad():
        for start in range(0, len(images), _BATCH):
            batch = images[start : start + _BATCH].detach().to(device="cpu", dtype=torch.float32)
            x = (batch.clamp(-1, 1) + 1) / 2
            if list(x.shape[2:]) != size:
                x = F.interpolate(x, size=size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
            if x.shape[1] != channels:
                x = x.expand(-1, channels, -1, -1) if x.shape[1] == 1 else x.mean(1, keepdim=True)
            found.append(model((x - mean) / std))
    return torch.cat(found)


@functools.lru_cache(maxsize=2)
def _extractor(name: str, pretrained_path: str | None) -> tuple[nn.Module, Mapping[str, Any]]:
    """The model without its classifier, in evaluation mode on the CPU, and its preprocessing."""
    architecture, args, config, path = name, {}, None, pretrained_path
    if name == BUNDLED:
        folder = Path(str(resources.files("autopeft"))) / "models" / "weights"
        known = json.loads((folder / f"{name}.json").read_text())
        architecture, args, config = known["architecture"], known["model_args"], known["pretrained_cfg"]
        path = pretrained_path or str(folder / f"{name}.safetensors")
    elif not timm.is_model(name):
        raise UsageError(f"no timm model is called {name!r}; give a name that timm.list_models() has, or {BUNDLED}")
    with torch.random.fork_rng(devices=[]):
        model = timm.create_model(architecture, pretrained=path is None, num_classes=0, **args)
    if path is not None:
        _fill(model, Path(path).expanduser())
    return model.float().eval().requires_grad_(False), config or timm.data.resolve_model_data_config(model)


def _fill(model: nn.Module, path: Path) -> None:
    """Every tensor of the model from a safetensors file; what the file has besides is the classifier."""
    if not path.is_file() or path.suffix != ".safetensors":
        raise UsageError(f"the weights of a feature extractor are a .safetensors file, got {str(path)!r}")
    missing = model.load_state_dict(load_file(path), strict=False).missing_keys
    if missing:
        raise UsageError(f"{str(path)!r} lacks {len(missing)} tensors of the feature extractor, such as {missing[0]}")
