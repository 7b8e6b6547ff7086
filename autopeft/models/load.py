"""From a model specification to a model in memory."""

from __future__ import annotations

from pathlib import Path

import torch

from autopeft.errors import UnknownModel, UsageError
from autopeft.models._trace import trace
from autopeft.models.bundled import load_bundled
from autopeft.models.diffusers import load_diffusers
from autopeft.models.loaded import LoadedModel
from autopeft.models.python import load_python
from autopeft.models.spec import ModelSpec
from autopeft.models.timm import load_timm

__all__ = ["LoadedModel", "load_model"]

_LATER = ("transformers",)
_SPELLINGS = (
    "a timm name, 'bundled:NAME', 'local-dir:FOLDER', 'hf-hub:OWNER/NAME' of a timm model, "
    "'diffusers:OWNER/NAME#unet', 'diffusers:FOLDER#unet' or 'py:package.module:function'"
)


def load_model(spec: ModelSpec) -> LoadedModel:
    """Load a model: on the CPU, in float32, in evaluation mode.

    The prefix says where it comes from: none for timm's own names, `bundled:`, `local-dir:`, `hf-hub:`,
    `diffusers:`, `py:`.
    Weights that are not there offline are an error at once; nothing waits for the network.

    Args:
        spec: the specification.

    Returns:
        The model with its preprocessing.

    Raises:
        UnknownModel: when the specification leads nowhere, or its weights cannot be fetched.
        UsageError: when an argument or a file of weights does not fit the model, the model does not run on images of
            its size, or the kind is not supported.
        MissingDependency: when a package is absent that the model needs.
    """
    loaded = _dispatch(spec)
    size = loaded.data_config["input_size"]
    seen = trace(loaded.model, torch.zeros(1, *size))
    if not seen.watched:
        raise UsageError(
            f"the model {spec.spec!r} does not run on images of {size[1]} x {size[2]} pixels with {size[0]} channels: "
            f"{seen.reason.rstrip('.')}; give another image size"
        )
    return loaded


def _dispatch(spec: ModelSpec) -> LoadedModel:
    prefix, colon, rest = spec.spec.partition(":")
    if colon and prefix in ("local-dir", "hf-hub"):
        return load_timm(spec)
    if colon and prefix == "bundled":
        return load_bundled(spec, rest)
    if colon and prefix == "diffusers":
        return load_diffusers(spec, rest)
    if colon and prefix == "py":
        return load_python(spec, rest)
    if colon and prefix in _LATER:
        raise UsageError(f"models of {prefix!r} are not supported yet ({spec.spec!r}); supported are {_SPELLINGS}")
    if colon:
        raise UnknownModel(f"unknown kind of model {prefix!r} in {spec.spec!r}; known are {_SPELLINGS}")
    if "/" in spec.spec or spec.spec.startswith("."):
        _refuse_path(spec.spec)
    return load_timm(spec)


def _refuse_path(text: str) -> None:
    folder = "which exists" if Path(text).expanduser().is_dir() else "which does not exist here"
    name = text.rstrip("/").rpartition("/")[2]
    raise UnknownModel(
        f"the model {text!r} could be a folder or a name on the hub; write 'local-dir:{text}' for the folder "
        f"({folder}), 'hf-hub:{text}' for a timm model on the hub, or '{name}' for timm's own name"
    )
