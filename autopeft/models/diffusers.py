"""Denoisers of diffusers: from a folder, from the hub."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from autopeft.errors import MissingDependency, UnknownModel, UsageError
from autopeft.models._denoiser import is_denoiser, takes_text
from autopeft.models._hub import prompt_hub
from autopeft.models._weights import load_weights
from autopeft.models.loaded import LoadedModel
from autopeft.models.spec import ModelSpec

__all__ = ["load_diffusers"]

_INIT_SEED = 0
_COMPONENTS = ("unet", "transformer")
_WANTED = ("*.json", "*/*.json", "*/*.txt", "*/*.model")


def load_diffusers(spec: ModelSpec, target: str) -> LoadedModel:
    """Load the denoiser of a pipeline as diffusers writes it: a U-Net or a transformer.

    The preprocessing has timm's keys, for images in [-1, 1], and `diffusion`: the `folder` of the pipeline, the
    `scheduler`'s settings (empty when it has none), `latent`, pixels of the image per pixel of what is denoised, 1
    without a VAE, and `text`, whether the model looks at texts. The size of the images is the specification's, else
    the model's own.

    Args:
        spec: the specification.
        target: `SOURCE#COMPONENT`, where the source is a folder or `OWNER/NAME[@REVISION]` on the hub; without a
            component its `unet`, else its `transformer`. A folder may also be the component's own.

    Raises:
        MissingDependency: without diffusers.
        UnknownModel: when the source leads nowhere, or holds no such component.
        UsageError: when an argument or a file of weights does not fit the model, or the component is no denoiser.
    """
    library = _diffusers()
    source, _, component = target.partition("#")
    folder = Path(source).expanduser()
    if not folder.is_dir():
        folder = _fetch(spec, source, component)
    place = _component(folder, component, spec.spec)
    config = _read(place / "config.json")
    kind = getattr(library, str(config.get("_class_name", "")), None)
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise UnknownModel(
            f"{place} is no model that diffusers {library.__version__} knows: {config.get('_class_name')!r}"
        )
    model = _build(kind, place, config, spec)
    if not is_denoiser(model):
        raise UsageError(
            f"{type(model).__name__} of {spec.spec!r} is no denoiser (its forward takes no timestep); "
            f"name another component, {' or '.join(f'#{name}' for name in _COMPONENTS)}"
        )
    root = folder if place != folder else folder.parent
    return LoadedModel(
        model=model.float().eval(),
        data_config=_data_config(model, root, spec),
        name=spec.spec,
        architecture=type(model).__name__,
        model_args=dict(spec.kwargs),
        pretrained_tag=place.name if spec.pretrained and spec.pretrained_path is None else "",
    )


def _diffusers() -> ModuleType:
    try:
        import diffusers
    except ImportError as error:
        raise MissingDependency("diffusers", "diffusion", "load a diffusion model (diffusers:...)") from error
    return diffusers  # type: ignore[no-any-return]  # diffusers is not typed


def _component(folder: Path, name: str, spec: str) -> Path:
    """The folder of a component."""
    if name:
        found = [folder / name]
    elif (folder / "config.json").is_file():
        found = [folder]
    else:
        found = [folder / known for known in _COMPONENTS]
    for place in found:
        if (place / "config.json").is_file():
            return place
    there = sorted(p.parent.name for p in folder.glob("*/config.json")) if folder.is_dir() else []
    wanted = repr(name) if name else " or ".join(map(repr, _COMPONENTS))
    raise UnknownModel(
        f"{spec!r} leads to {folder}, which holds no component {wanted}; it holds {', '.join(there) or 'no component'}"
    )


def _fetch(spec: ModelSpec, source: str, component: str) -> Path:
    """A repository of the hub, or what the cache holds of it: settings, the component's weights, no other pipeline."""
    from huggingface_hub import snapshot_download

    repository, _, revision = source.partition("@")
    if repository.count("/") != 1 or source.startswith((".", "/", "~")):
        raise UnknownModel(f"{spec.spec!r} names no folder that exists here, and no repository OWNER/NAME of the hub")
    names = [component] if component else list(_COMPONENTS)
    wanted = [*_WANTED, *(f"{n}/*.safetensors" for n in (*names, "vae", "text_encoder"))]
    with prompt_hub() as reachable:
        try:
            return Path(
                snapshot_download(
                    repository,
                    revision=revision or None,
                    allow_patterns=wanted,
                    ignore_patterns=["*.fp16.*", "*.non_ema.*"],
                )
            )
        except Exception as error:
            why = "it is not there" if reachable else "the hub cannot be reached and the cache does not hold it"
            raise UnknownModel(
                f"the model {spec.spec!r} cannot be fetched: {why} ({type(error).__name__}); where there is a "
                f"network run `hf download {repository} --local-dir FOLDER`, here give 'diffusers:FOLDER#{names[0]}'"
            ) from error


def _build(kind: Any, place: Path, config: Mapping[str, Any], spec: ModelSpec) -> nn.Module:
    fetch = spec.pretrained and spec.pretrained_path is None
    unknown = [key for key in spec.kwargs if key not in config]
    if unknown:
        raise UsageError(
            f"{config.get('_class_name')} of {spec.spec!r} has no setting {unknown[0]!r}; its settings are "
            f"{', '.join(key for key in config if not key.startswith('_'))}"
        )
    with torch.random.fork_rng(devices=[]), _quiet():
        torch.manual_seed(_INIT_SEED)
        try:
            if fetch:
                model = kind.from_pretrained(place, torch_dtype=torch.float32, local_files_only=True, **spec.kwargs)
            else:
                model = kind.from_config({**config, **spec.kwargs})
        except (OSError, ValueError, RuntimeError, TypeError) as error:
            reason = str(error).strip().split("\n", 1)[0]
            raise UsageError(f"the model {spec.spec!r} cannot be built from {place}: {reason}") from error
    if spec.pretrained_path is not None:
        load_weights(model, Path(spec.pretrained_path).expanduser())
    found: nn.Module = model
    return found


def _data_config(model: nn.Module, folder: Path, spec: ModelSpec) -> dict[str, Any]:
    config: Mapping[str, Any] = model.config  # type: ignore[assignment]  # every model of diffusers has one
    vae = _read(folder / "vae" / "config.json")
    latent = 2 ** (len(vae["block_out_channels"]) - 1) if vae else 1
    own = config.get("sample_size")
    height, width = (own, own) if isinstance(own, int) else tuple(own or (64, 64))
    if spec.img_size is not None:
        if spec.img_size % latent:
            raise UsageError(f"the image size must be a multiple of {latent}, got {spec.img_size}")
        height = width = spec.img_size // latent
    channels = int(config["in_channels"])
    return {
        "input_size": (channels, height, width),
        "interpolation": "bicubic",
        "mean": (0.5,) * (3 if vae else channels),
        "std": (0.5,) * (3 if vae else channels),
        "crop_pct": 1.0,
        "crop_mode": "center",
        "diffusion": {
            "folder": str(folder),
            "scheduler": _read(folder / "scheduler" / "scheduler_config.json"),
            "latent": latent,
            "text": takes_text(model),
        },
    }


def _read(path: Path) -> dict[str, Any]:
    """A file of settings; empty when it is absent."""
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UnknownModel(f"{path} is no JSON: {error}") from error
    return dict(data)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without diffusers' remarks on unused settings and half-precision files."""
    logger = logging.getLogger("diffusers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
