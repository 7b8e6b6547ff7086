"""Models of timm: by name, from a folder, from the hub."""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config
from torch import nn

from autopeft.errors import UnknownModel, UsageError
from autopeft.models._hub import prompt_hub
from autopeft.models._weights import load_weights
from autopeft.models.loaded import LoadedModel
from autopeft.models.spec import ModelSpec

__all__ = ["create", "data_config_of", "load_timm"]

_INIT_SEED = 0
"""Seed of random weights: a model without pre-trained ones is the same in every process."""


def load_timm(spec: ModelSpec) -> LoadedModel:
    """Load a model by timm's name, `local-dir:` or `hf-hub:`.

    Raises:
        UnknownModel: when there is no such name, tag, folder or repository, or the weights cannot be fetched.
        UsageError: when an argument or a file of weights does not fit the model.
    """
    if spec.spec.startswith("local-dir:"):
        folder = Path(spec.spec.removeprefix("local-dir:")).expanduser()
        saved = _read_config(folder, spec.spec)
        source = f"local-dir:{folder}"
    elif spec.spec.startswith("hf-hub:"):
        saved, source = {}, spec.spec
    else:
        _check_name(spec.spec)
        saved, source = {}, spec.spec
    fetch = spec.pretrained and spec.pretrained_path is None
    with prompt_hub() as reachable:
        try:
            model, args = create(source, spec, pretrained=fetch)
        except UsageError:
            raise
        except Exception as error:
            raise _explain(spec, error, reachable) from error
    if spec.pretrained_path is not None:
        load_weights(model, Path(spec.pretrained_path).expanduser())
    config: Mapping[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    return LoadedModel(
        model=model.float().eval(),
        data_config=data_config_of(model, spec),
        name=spec.spec,
        architecture=str(config.get("architecture") or spec.spec.partition(".")[0]),
        model_args={**_saved_args(model, saved), **args},
        pretrained_tag=str(config.get("tag") or "") if fetch else "",
        label_names=tuple(str(name) for name in config.get("label_names") or ()),
    )


def create(
    source: str, spec: ModelSpec, *, pretrained: bool, defaults: Mapping[str, Any] | None = None,
    pretrained_cfg: Mapping[str, Any] | None = None,
) -> tuple[nn.Module, dict[str, Any]]:  # fmt: skip
    """Build a model with timm and say with which arguments.

    The image size is passed to architectures that are built for one and left to the data of those that are not.

    Args:
        source: what `timm.create_model` takes as a name.
        spec: image size and arguments.
        pretrained: whether timm loads weights.
        defaults: arguments that the specification may override.
        pretrained_cfg: timm's configuration, for a model that timm does not list.

    Raises:
        UsageError: when the constructor refuses an argument.
    """
    args = {**(defaults or {}), **spec.kwargs}
    sized = args if spec.img_size is None else {**args, "img_size": spec.img_size}
    extra = {} if pretrained_cfg is None else {"pretrained_cfg": dict(pretrained_cfg)}
    with torch.random.fork_rng(devices=[]), _quiet():
        for attempt in (sized, args):
            torch.manual_seed(_INIT_SEED)
            try:
                return timm.create_model(source, pretrained=pretrained, **extra, **attempt), dict(attempt)
            except TypeError as error:
                if "img_size" in str(error) and "img_size" in attempt and "img_size" not in args:
                    continue
                raise UsageError(
                    f"the model {spec.spec!r} does not take these arguments: {error}; check the model's arguments"
                ) from error
            except (AssertionError, ValueError, ZeroDivisionError) as error:
                raise UsageError(
                    f"the model {spec.spec!r} cannot be built with {_spelled(attempt)}: {error}"
                ) from error
    raise UsageError(f"the model {spec.spec!r} takes no image size")


def data_config_of(model: nn.Module, spec: ModelSpec) -> dict[str, Any]:
    """The model's preprocessing, at the image size that was asked for."""
    config: dict[str, Any] = dict(resolve_model_data_config(model))
    size = spec.kwargs.get("img_size", spec.img_size)
    if size is not None:
        height, width = (size, size) if isinstance(size, int) else size
        config["input_size"] = (config["input_size"][0], height, width)
    return {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}


def _check_name(name: str) -> None:
    base, _, tag = name.partition(".")
    if not timm.is_model(base):
        near = difflib.get_close_matches(base, timm.list_models(), n=3, cutoff=0.6)
        hint = f"did you mean {' or '.join(near)}?" if near else "`timm.list_models()` lists the names"
        raise UnknownModel(f"timm has no model called {base!r}; {hint}")
    tags = [full.partition(".")[2] for full in timm.list_pretrained(base + ".*")]
    if tag and tag not in tags:
        near = difflib.get_close_matches(tag, tags, n=3, cutoff=0.4) or tags[:3]
        hint = f"there are {', '.join(f'{base}.{t}' for t in near)}" if near else "there are none"
        raise UnknownModel(f"timm has no weights {tag!r} for {base}; {hint}")


def _read_config(folder: Path, spec: str) -> dict[str, Any]:
    if not folder.is_dir():
        raise UnknownModel(f"there is no folder {str(folder)!r} (model {spec!r})")
    path = folder / "config.json"
    if not path.is_file():
        raise UnknownModel(f"{str(folder)!r} holds no config.json, so it is no timm model folder (model {spec!r})")
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UnknownModel(f"{str(path)!r} cannot be read as JSON: {error}") from error
    architecture = config.get("architecture") if isinstance(config, dict) else None
    if not isinstance(architecture, str) or not timm.is_model(architecture):
        raise UnknownModel(
            f"{str(path)!r} names no architecture of timm (found {architecture!r}); only timm models can be loaded "
            "from a folder"
        )
    return dict(config)


def _explain(spec: ModelSpec, error: Exception, reachable: bool) -> UnknownModel:
    """One sentence about why a model could not be made."""
    reason = (str(error).strip().split("\n", 1)[0] or type(error).__name__).rstrip(".")
    if spec.spec.startswith("local-dir:"):
        return UnknownModel(f"the model {spec.spec!r} cannot be loaded: {reason}")
    repository = spec.spec.removeprefix("hf-hub:")
    if not spec.spec.startswith("hf-hub:"):
        config = timm.get_pretrained_cfg(spec.spec)
        if config is None or not config.has_weights:
            return UnknownModel(
                f"timm publishes no weights for {spec.spec!r}; give a file with --pretrained-path, or ask for random "
                "weights with model.pretrained=false"
            )
        repository = str(config.hf_hub_id or f"timm/{spec.spec}")
        # An id that ends in a slash stands for a repository called like the architecture with its tag.
        if repository.endswith("/"):
            repository += f"{config.architecture}.{config.tag}"
    where = "the hub cannot be reached from here and the cache does not hold them" if not reachable else reason
    return UnknownModel(
        f"the weights of {spec.spec!r} are not available: {where}. Where there is a network, run `hf download "
        f"{repository} --local-dir FOLDER`, then use --model local-dir:FOLDER here; or give a file of weights with "
        "--pretrained-path"
    )


def _saved_args(model: nn.Module, saved: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that came with a saved model: from its folder, or as timm remembers them for one from the hub."""
    args = saved.get("model_args") or getattr(model, "_model_args", None) or {}
    return dict(args)


def _spelled(args: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in args.items()) or "its defaults"


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the loader's narration at INFO and WARNING; what goes wrong is raised anyway."""
    logger = logging.getLogger("timm")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
