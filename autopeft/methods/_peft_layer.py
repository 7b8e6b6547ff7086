"""Building the layers of Hugging Face PEFT on modules of a model, without touching the model."""

from __future__ import annotations

import contextlib
import copy
import difflib
import io
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from autopeft.core.site import Site
from autopeft.errors import UsageError
from autopeft.methods._host import is_plain
from autopeft.methods._peft_refusals import RESERVED
from autopeft.methods._peft_tuner import Tuner

__all__ = ["ADAPTER", "check_fields", "config_class", "nested_settings", "obstacle_of", "stand_in", "start_of", "wrap"]

ADAPTER = "default"
"""What PEFT calls the adapter in its layers: each layer holds one."""

_SAME_PADDING = "timm.layers.conv2d_same.Conv2dSame"

_INITS = frozenset({"gaussian", "eva", "olora", "pissa", "orthogonal", "lora_ga"})
"""Initialisations of LoRA that keep the price and the base."""

_FAULTS = (
    ValueError,
    TypeError,
    NotImplementedError,
    RuntimeError,
    AttributeError,
    KeyError,
    IndexError,
    ZeroDivisionError,
    AssertionError,
)
"""What PEFT raises when a layer or a field does not suit it."""


def config_class(name: str, tuner: Tuner) -> Any:
    """The configuration class of an adapter type.

    Raises:
        UsageError: when the installed PEFT is too old for it.
    """
    import peft

    found = getattr(peft, tuner.config, None)
    if found is None:
        raise UsageError(f"peft: the installed PEFT {peft.__version__} has no {tuner.config}; {name} needs a newer one")
    return found


def check_fields(name: str, tuner: Tuner, fields: Mapping[str, Any], size: str | None) -> None:
    """Refuse fields that the configuration does not have, that the plan decides, or that cannot be honoured.

    Raises:
        UsageError: naming the field.
    """
    if not fields and size is None:
        return
    known = set(config_class(name, tuner).__dataclass_fields__)
    for field in (*fields, *([size] if size else [])):
        if field not in known:
            near = difflib.get_close_matches(field, known - RESERVED, n=1)
            guess = f" Did you mean {near[0]!r}?" if near else ""
            raise UsageError(
                f"peft: {tuner.config} has no field {field!r}.{guess} Known: {', '.join(sorted(known - RESERVED))}"
            )
        if field in RESERVED:
            raise UsageError(f"peft: {field!r} of {name} says where or how large, and the plan decides that; leave it")
    sized = (size,) if size else tuner.size_fields
    for field, value in fields.items():
        if field in sized:
            raise UsageError(f"peft: {field!r} of {name} is the size, which the plan decides; leave it out of `fields`")
        if value and field in tuner.refused:
            raise UsageError(f"peft: {name} cannot take {field!r}: {tuner.refused[field]}")
    init = fields.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in _INITS and not init.startswith("pissa_niter_"):
        raise UsageError(
            f"peft: init_lora_weights of {name} must be true, pissa_niter_N or one of {', '.join(sorted(_INITS))}, "
            f"got {init!r}: others change what the base or the price is"
        )
    if (fields.get("eva_config") or {}).get("rho", 1.0) != 1.0:
        raise UsageError("peft: eva_config.rho must be 1: moving ranks between layers is the plan's business")


def start_of(settings: Mapping[str, Any]) -> Literal["", "recomputed", "stored"]:
    """Whether a part of the base's weight becomes the start of the adapter, and how that part is known again."""
    init = settings.get("init_lora_weights")
    if not isinstance(init, str):
        return ""
    if init.lower() in ("pissa", "olora"):
        return "recomputed"
    return "stored" if init == "lora_ga" or init.startswith("pissa_niter_") else ""


def obstacle_of(name: str, tuner: Tuner, site: Site, host: nn.Module) -> str:
    """Why PEFT's layer would be wrong on this host though it accepts it; empty when it is right."""
    if site.kind == "layer_norm":
        return ""
    if is_plain(host):
        dilation = getattr(host, "dilation", (1,))
        if any(d != 1 for d in dilation) and not tuner.dilated:
            return f"PEFT's {name} ignores the dilation {tuple(dilation)} of a convolution"
        return ""
    kind = type(host)
    if f"{kind.__module__}.{kind.__qualname__}" == _SAME_PADDING:
        if tuner.same:
            return ""
        return f"{kind.__name__} pads by a rule of its own, which PEFT's {name} does not know"
    if name == "ln_tuning":
        return ""
    return (
        f"the forward of a {kind.__name__} is not the plain one of its weight (it may standardise it), so that "
        f"PEFT's {name} would be merged wrongly"
    )


def stand_in(host: nn.Module, *, exact: bool = False) -> nn.Module:
    """A module like the host, on the CPU, whose tensors are the host's and can be exchanged without it noticing.

    Args:
        host: the module, left as it is.
        exact: keep float64; otherwise, and for other precisions, float32.

    Returns:
        A shallow copy without hooks. Its tensors are frozen copies, so that an initialisation may write into them.
    """
    shadow = copy.copy(host)
    held: dict[str, nn.Parameter | None] = {}
    for name, tensor in host._parameters.items():
        if tensor is None:
            held[name] = None
            continue
        data = tensor.detach()
        if data.device.type != "meta":
            dtype = torch.float64 if exact and data.dtype == torch.float64 else torch.float32
            data = data.to(device="cpu", dtype=dtype, copy=True)
        held[name] = nn.Parameter(data, requires_grad=False)
    shadow._parameters = held
    shadow._buffers = dict(host._buffers)
    shadow._modules = {name: child for name, child in host._modules.items() if not name.startswith("autopeft")}
    for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        setattr(shadow, name, OrderedDict())
    return shadow


def wrap(
    name: str,
    tuner: Tuner,
    settings: Mapping[str, Any],
    hosts: Sequence[nn.Module],
    seed: int,
    adjust: Callable[[Any], None] | None = None,
) -> list[Any]:
    """Put one adapter of PEFT on modules.

    Args:
        name: name of the adapter type, for messages.
        tuner: what is known of it.
        settings: fields of its configuration.
        hosts: stand-ins; they become the base layers.
        seed: seed of the initialisation; the caller's random state is left alone.
        adjust: changes the configuration where PEFT has no field for it.

    Returns:
        PEFT's layers. What a tuner owns besides (FRoD's projections) the layers refer to.

    Raises:
        UsageError: with PEFT's own words when it refuses.
    """
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    names = [f"h{i}" for i in range(len(hosts))]
    shell = nn.Module()
    for key, host in zip(names, hosts, strict=True):
        shell.add_module(key, host)
    # PEFT warns of what is meant here, such as shapes that a size divides, and prints how it compiles BOFT's kernel.
    quiet = contextlib.redirect_stdout(io.StringIO())
    with warnings.catch_warnings(), quiet, torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        try:
            config = config_class(name, tuner)(target_modules=list(names), **nested_settings(settings, names))
            if adjust is not None:
                adjust(config)
            PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type](shell, config, ADAPTER)
        except _FAULTS as error:
            raise UsageError(f"peft: {name} with {dict(settings)} is refused by PEFT: {error}") from error
    layers = [getattr(shell, key) for key in names]
    for layer in layers:
        _unfreeze(name, tuner, layer)
        # A plain attribute: a child would be counted, saved and moved with the adapter.
        base = layer._modules.pop("base_layer")
        object.__setattr__(layer, "base_layer", base)
    return layers


def nested_settings(settings: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The fields, with parts that are mappings in a study as the objects that PEFT takes."""
    import peft
    from peft.tuners.lora.config import LoraGAConfig

    found = dict(settings)
    if "eva_config" in found:
        found["eva_config"] = peft.EvaConfig(**{"rho": 1.0, **(found["eva_config"] or {})})
    if "lora_ga_config" in found:
        found["lora_ga_config"] = LoraGAConfig(**(found["lora_ga_config"] or {}))
    if "feedforward_modules" in found:
        found["feedforward_modules"] = list(names) if found["feedforward_modules"] else []
    return found


def _unfreeze(name: str, tuner: Tuner, layer: Any) -> None:
    """Keep out of the saved state what follows from the weight and the configuration, parameters by name included."""
    from peft.tuners._buffer_dict import BufferDict

    for key in tuner.derived:
        tensors: dict[str, Tensor] = dict(getattr(layer, key).items())
        layer._modules[key] = BufferDict({k: t.detach() for k, t in tensors.items()}, persistent=False)
    frozen = [n for n, p in layer.named_parameters() if not p.requires_grad and not n.startswith("base_layer.")]
    if frozen:
        raise UsageError(f"peft: {name} freezes {', '.join(frozen)} with these fields; a plan pays for what is trained")
