"""The models that come with the package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from autopeft.errors import UnknownModel
from autopeft.models._weights import load_weights
from autopeft.models.diffusers import load_diffusers
from autopeft.models.loaded import LoadedModel
from autopeft.models.spec import ModelSpec
from autopeft.models.timm import create, data_config_of

__all__ = ["load_bundled"]

_WEIGHTS = Path(__file__).with_name("weights")


def load_bundled(spec: ModelSpec, name: str) -> LoadedModel:
    """Load a model of the package's own folder of weights.

    Args:
        spec: the specification.
        name: `vit_tiny_fashion`: a vision transformer of 1.2 million parameters; `unet_tiny_fashion`: a
            class-conditional denoiser of 0.7 million, of images of 16 x 16. Both were pre-trained on Fashion-MNIST.

    Raises:
        UnknownModel: when the package holds no such model.
        UsageError: when an argument or a file of weights does not fit the model.
        MissingDependency: for the denoiser, when diffusers is absent.
    """
    if name and (_WEIGHTS / name).is_dir():
        return load_diffusers(spec, str(_WEIGHTS / name))
    path = _WEIGHTS / f"{name}.json"
    if not path.is_file():
        known = ", ".join(sorted({*(p.stem for p in _WEIGHTS.glob("*.json")), *_folders()}))
        raise UnknownModel(f"the package holds no model called {name!r}; it holds {known}")
    config: dict[str, Any] = json.loads(path.read_text())
    model, args = create(
        config["architecture"],
        spec,
        pretrained=False,
        defaults=config["model_args"],
        pretrained_cfg=config["pretrained_cfg"],
    )
    bundled = spec.pretrained and spec.pretrained_path is None
    if spec.pretrained_path is not None:
        load_weights(model, Path(spec.pretrained_path).expanduser())
    elif spec.pretrained:
        load_weights(model, path.with_suffix(".safetensors"))
    return LoadedModel(
        model=model.float().eval(),
        data_config=data_config_of(model, spec),
        name=spec.spec,
        architecture=config["architecture"],
        model_args=args,
        pretrained_tag=config["pretrained_cfg"]["tag"] if bundled else "",
        label_names=tuple(config["pretrained_cfg"]["label_names"]),
    )


def _folders() -> list[str]:
    return [p.name for p in _WEIGHTS.iterdir() if (p / "unet").is_dir()]
