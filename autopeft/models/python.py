"""Models that a function of the user's own builds."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from autopeft.errors import UnknownModel, UsageError
from autopeft.models._weights import load_weights
from autopeft.models.loaded import LoadedModel
from autopeft.models.spec import ModelSpec
from autopeft.models.timm import data_config_of

__all__ = ["load_python"]

_INIT_SEED = 0


def load_python(spec: ModelSpec, target: str) -> LoadedModel:
    """Call a function that returns an `nn.Module`, with the specification's arguments.

    Modules are looked for where Python looks and in the current folder. A module may carry `pretrained_cfg`, a dict
    with the keys of timm's (`input_size`, `mean`, `std`, `interpolation`, `crop_pct`, `classifier`, ...), which gives
    its preprocessing; without one timm's defaults hold, at the specification's image size.

    Args:
        spec: the specification.
        target: `package.module:function`, or a class.

    Raises:
        UnknownModel: when the module or the function is not there.
        UsageError: when the function fails on its arguments or returns something else, or the weights do not fit.
    """
    path, colon, name = target.partition(":")
    if not colon or not path or not name:
        raise UsageError(f"{spec.spec!r} should read 'py:package.module:function'")
    build = _find(_import(path, spec.spec), name, spec.spec)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_INIT_SEED)
        try:
            model = build(**spec.kwargs)
        except TypeError as error:
            raise UsageError(
                f"{spec.spec!r} does not take the model's arguments {dict(spec.kwargs)}: {error}"
            ) from error
    if not isinstance(model, nn.Module):
        raise UsageError(f"{spec.spec!r} should return a torch.nn.Module, it returned a {type(model).__name__}")
    if spec.pretrained_path is not None:
        load_weights(model, Path(spec.pretrained_path).expanduser())
    return LoadedModel(
        model=model.float().cpu().eval(),
        data_config=data_config_of(model, spec),
        name=spec.spec,
        architecture=type(model).__name__,
        model_args=dict(spec.kwargs),
    )


def _import(path: str, spec: str) -> ModuleType:
    sys.path.insert(0, "")
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        missing = error.name or path
        inside = "" if path == missing or path.startswith(missing + ".") else f", which {path!r} imports"
        raise UnknownModel(
            f"there is no Python module {missing!r}{inside} (model {spec!r}); run from the folder that holds it or "
            "install its package"
        ) from error
    except (ImportError, SyntaxError) as error:
        raise UnknownModel(f"the Python module {path!r} cannot be imported (model {spec!r}): {error}") from error
    finally:
        sys.path.remove("")


def _find(module: ModuleType, name: str, spec: str) -> Callable[..., Any]:
    found: object = module
    for part in name.split("."):
        if not hasattr(found, part):
            near = difflib.get_close_matches(part, dir(found), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UnknownModel(f"{module.__name__!r} has no {name!r} (model {spec!r}){hint}")
        found = getattr(found, part)
    if not callable(found):
        raise UsageError(
            f"{name!r} of {module.__name__!r} is no function but a {type(found).__name__} (model {spec!r})"
        )
    return found
