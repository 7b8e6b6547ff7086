"""A folder that timm and transformers load: `config.json` and `model.safetensors`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from torch import Tensor, nn

from autopeft.core.record import Record
from autopeft.errors import ExportError
from autopeft.export._files import write_tensors
from autopeft.export._model import pretrained_config
from autopeft.store.atomic import write_json

__all__ = ["class_names", "rebuild", "timm_config", "write_timm_folder"]

_KEPT = ("fixed_input_size", "first_conv", "classifier")
"""What of the model's own pre-trained configuration still holds after fine-tuning."""


def write_timm_folder(model: nn.Module, state: Mapping[str, Tensor], record: Record, folder: Path) -> tuple[Path, Path]:
    """Write `config.json` and `model.safetensors`.

    Args:
        model: the borrowed model, for its configuration alone.
        state: state dict of the plain model.
        record: architecture, arguments, preprocessing and class names.
        folder: where to.

    Returns:
        The paths of the two files.
    """
    weights = write_tensors(folder / "model.safetensors", state)
    config = folder / "config.json"
    write_json(config, timm_config(model, record))
    return config, weights


def timm_config(model: nn.Module, record: Record) -> dict[str, Any]:
    """`config.json`: what timm needs to rebuild the model, and transformers to wrap it.

    `model_args` must not hold `num_classes`: transformers passes its own and fails on the second. It needs
    `label_names`, or it takes ImageNet's.
    """
    names = class_names(record, model)
    arguments = {key: value for key, value in record.model.get("model_args", {}).items() if key != "num_classes"}
    own = pretrained_config(model)
    pretrained = {key: own[key] for key in _KEPT if own.get(key) is not None}
    pretrained |= {key: _plain(value) for key, value in record.model.get("data_config", {}).items()}
    # Weights from a file or from nowhere are not those that timm's own tag and licence describe.
    if tag := record.model.get("pretrained_tag"):
        pretrained |= {"tag": tag, **({"license": own["license"]} if own.get("license") else {})}
    pretrained |= {"custom_load": False, "num_classes": len(names)}
    config: dict[str, Any] = {
        "architecture": record.model.get("architecture", ""),
        "num_classes": len(names),
        "num_features": int(getattr(model, "num_features", 0)),
        "label_names": names,
        "model_args": {key: _plain(value) for key, value in arguments.items()},
        "pretrained_cfg": pretrained,
    }
    pool = getattr(model, "global_pool", None)
    if isinstance(pool, str) and pool:
        config["global_pool"] = pool
    return config


def class_names(record: Record, model: nn.Module) -> list[str]:
    """Names of the classes in label order.

    Raises:
        ExportError: when the record names another number of classes than the model has outputs.
    """
    names = [str(name) for name in record.data.get("classes", ())]
    outputs = getattr(model, "num_classes", len(names))
    if len(names) != outputs:
        raise ExportError(f"the record names {len(names)} classes, but the model has {outputs} outputs")
    return names


def rebuild(model: nn.Module, state: Mapping[str, Tensor], record: Record, **kwargs: Any) -> nn.Module:
    """A plain model with this state, built anew by timm: in evaluation mode, on the CPU."""
    arguments = {key: value for key, value in record.model.get("model_args", {}).items() if key != "num_classes"}
    names = class_names(record, model)
    plain: nn.Module = timm.create_model(
        str(record.model["architecture"]), pretrained=False, num_classes=len(names), **arguments, **kwargs
    )
    plain.load_state_dict(dict(state))
    return plain.eval()


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
