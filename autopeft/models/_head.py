"""Where the classifier of a model is."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from autopeft.models._denoiser import is_denoiser, label_paths

__all__ = ["head_paths"]


def head_paths(model: nn.Module) -> tuple[str, ...]:
    """Dotted paths of the classifier modules: as timm declares them, else the last Linear of the model.

    timm's configuration comes first (`classifier`, a name or several), then `get_classifier()`. Paths that lead to a
    module without parameters (a classifier that was taken off) are left out. The head of a denoiser is its table of
    labels; one that is not told a class has none.
    """
    if is_denoiser(model):
        return label_paths(model)
    modules = dict(model.named_modules())
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    declared = config.get("classifier") if isinstance(config, Mapping) else None
    names = [declared] if isinstance(declared, str) else list(declared or ())
    found = [name for name in names if name in modules]
    if not found:
        found = _from_getter(model, modules)
    if not found and not hasattr(model, "get_classifier"):
        linears = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
        found = linears[-1:]
    return tuple(name for name in found if any(True for _ in modules[name].parameters()))


def _from_getter(model: nn.Module, modules: Mapping[str, nn.Module]) -> list[str]:
    getter = getattr(model, "get_classifier", None)
    if getter is None:
        return []
    result = getter()
    wanted = list(result) if isinstance(result, list | tuple) else [result]
    return [name for name, module in modules.items() if name and any(module is one for one in wanted)]
