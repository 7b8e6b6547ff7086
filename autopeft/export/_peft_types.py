"""A plan of one adapter type of PEFT, as PEFT's own configuration and tensors."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from autopeft.core.contracts import Inserted
from autopeft.methods._peft_layer import ADAPTER, config_class, nested_settings
from autopeft.methods._peft_tuners import TUNERS
from autopeft.methods.peft_adapter import PeftAdapter

__all__ = ["TypedPlan", "not_one_type", "typed_kind", "typed_plan"]

_OWN_PROJECTIONS = frozenset({"frod", "pvera", "randlora", "tinylora", "vera"})
"""Types whose random projections PEFT draws once for all layers; here each layer has its own."""

_SAVED = {"delora": ("delora_w_norm",), "shira": ("shira_indices",), "supertuning": ("supertuning_indices",)}
"""What PEFT's files hold besides, though it follows from the weight or from a seed."""

_PATTERNS = {
    "alpha": "alpha_pattern",
    "block_size": "block_size_pattern",
    "effective_rank": "rank_pattern",
    "lora_alpha": "alpha_pattern",
    "n_frequency": "n_frequency_pattern",
    "r": "rank_pattern",
}
"""Field to the field that sets it layer by layer, where a configuration has one."""

_DOTTED = frozenset({"n_frequency"})
"""Patterns that PEFT matches behind a dot alone, so that they cannot be anchored."""


class TypedPlan:
    """The configuration and the tensors of a plan that `not_one_type` has nothing against.

    Attributes:
        config: what `adapter_config.json` says of the type.
        tensors: name in the model, without PEFT's prefix, to tensor.
    """

    def __init__(self, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.config = config
        self.tensors = tensors


def not_one_type(inserted: Inserted) -> str:
    """Why the plan cannot be written as one adapter of PEFT; empty when it can."""
    parts = inserted.named_adapters()
    for key, part in parts.items():
        if isinstance(part, PeftAdapter) and part.obstacle:
            return f"{key}: {part.obstacle}"
    others = [key for key, part in parts.items() if not isinstance(part, PeftAdapter)]
    if others:
        return f"{others[0]} is no layer of PEFT"
    adapters = [part for part in parts.values() if isinstance(part, PeftAdapter)]
    types = sorted({adapter.tuner for adapter in adapters})
    if len(types) > 1:
        return f"the plan has {' and '.join(types)}, and a folder of PEFT holds one type"
    (tuner,) = types
    if tuner in _OWN_PROJECTIONS:
        return f"each layer of {tuner} has random projections of its own, where PEFT draws them for all layers together"
    first = _common(tuner, adapters[0])
    for adapter in adapters[1:]:
        differing = sorted(k for k, v in _common(tuner, adapter).items() if first.get(k) != v)
        if differing:
            return (
                f"{differing[0]} of {tuner} differs between {adapters[0].site.name} and {adapter.site.name}, and PEFT "
                f"has no pattern for it"
            )
    if _varies("n_frequency", adapters) and any("." not in a.site.module for a in adapters):
        return f"PEFT cannot set n_frequency of a layer at the top of the model ({adapters[0].site.module})"
    return ""


def typed_kind(adapter: PeftAdapter) -> dict[str, Any] | None:
    """What a layer of PEFT must have in common with the others of its type in one folder; None when none can hold it.

    Layers whose size PEFT can set at a dot alone are left out at the top of the model, whatever the others' sizes.
    """
    nowhere = "n_frequency" in adapter.settings and "." not in adapter.site.module
    if adapter.obstacle or adapter.tuner in _OWN_PROJECTIONS or nowhere:
        return None
    return _common(adapter.tuner, adapter)


def typed_plan(inserted: Inserted) -> TypedPlan:
    """The plan in PEFT's terms: sizes that differ become patterns anchored to one layer each."""
    adapters = [part for part in inserted.named_adapters().values() if isinstance(part, PeftAdapter)]
    tuner = adapters[0].tuner
    cls = config_class(tuner, TUNERS[tuner])
    settings = dict(adapters[0].settings)
    if tuner == "supertuning":
        settings["save_precomputed_indices"] = True
    known = cls.__dataclass_fields__
    for name, pattern in _PATTERNS.items():
        if name in settings and pattern in known and _varies(name, adapters):
            settings[pattern] = {_key(name, a.site.module): a.settings[name] for a in adapters}
    modules = [adapter.site.module for adapter in adapters]
    if tuner == "ia3":
        settings["feedforward_modules"] = []
        scaled = [a.site.module for a in adapters if a.settings["feedforward_modules"]]
        settings = {**nested_settings(settings, ()), "feedforward_modules": scaled}
    else:
        settings = nested_settings(settings, ())
    config = _plain(cls(target_modules=modules, **settings).to_dict())
    tensors: dict[str, Tensor] = {}
    for adapter in adapters:
        held: dict[str, Tensor] = dict(adapter.layer.state_dict())
        for name in _SAVED.get(tuner, ()):
            held |= {f"{name}.{key}": tensor for key, tensor in getattr(adapter.layer, name).items()}
        for name, tensor in held.items():
            short = name.replace(f".{ADAPTER}", "", 1)
            tensors[f"{adapter.site.module}.{short}"] = tensor.detach().to("cpu", copy=True).contiguous()
    return TypedPlan(config, tensors)


def _common(tuner: str, adapter: PeftAdapter) -> dict[str, Any]:
    """The fields that PEFT has once for all layers."""
    known = config_class(tuner, TUNERS[tuner]).__dataclass_fields__
    left_out = {name for name, pattern in _PATTERNS.items() if pattern in known} | {"feedforward_modules"}
    return {name: value for name, value in adapter.settings.items() if name not in left_out}


def _varies(name: str, adapters: Sequence[PeftAdapter]) -> bool:
    return len({adapter.settings.get(name) for adapter in adapters}) > 1


def _key(name: str, module: str) -> str:
    return re.escape(module.partition(".")[2]) if name in _DOTTED else f"^{re.escape(module)}$"


def _plain(value: Any) -> Any:
    """PEFT's configuration as JSON has it, in an order that does not change from run to run."""
    if isinstance(value, dict):
        return {key: _plain(value[key]) for key in sorted(value)}
    if isinstance(value, set):
        return sorted(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value.value) if hasattr(value, "value") else value
