"""The residual blocks of a model: what depth is counted in."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from autopeft.models._roles import Host, host_of
from autopeft.models._trace import Trace

__all__ = ["Branch", "block_axis", "block_paths", "residual_branches"]

_NUMBERED = re.compile(r"^(b|block|denselayer|layer|unit)_?\d+$")


def block_paths(model: nn.Module, exclude: Sequence[str] = ()) -> tuple[str, ...]:
    """Dotted paths of the innermost composite members of lists of modules, in model order.

    A list is an `nn.Sequential`, an `nn.ModuleList`, or children called `b1`, `b2`, ... as in RegNet. In ViT the blocks
    are `blocks.i`, in Swin and ConvNeXt the blocks inside the stages, in ResNet the members of `layer1` to `layer4`, in
    EfficientNet the members of each stage of `blocks`. A member that is a list itself, or that holds fewer than two
    weight matrices (one convolution with its norm), is no block.

    Args:
        model: the model.
        exclude: paths whose inside is not looked at: the classifier.
    """
    modules = dict(model.named_modules())
    found: list[str] = []
    for name, module in modules.items():
        parent = modules[name.rpartition(".")[0]]
        listed = isinstance(parent, nn.Sequential | nn.ModuleList) or _NUMBERED.match(name.rpartition(".")[2])
        if not name or not listed:
            continue
        if isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict) or host_of(module) is not None:
            continue
        if any(name == path or name.startswith(path + ".") for path in exclude):
            continue
        matrices = sum(isinstance(m, nn.Linear | nn.Conv2d) for m in module.modules())
        if matrices >= 2:
            found.append(name)
    return tuple(name for name in found if not any(other.startswith(name + ".") for other in found))


_BRANCHES = (
    (re.compile(r"^(attn\d*|attention|self_attn|token_mixer|mixer|mlp_tokens)$"), "attn"),
    (re.compile(r"^(mlp|ff|ffn|feed_forward|mlp_channels)$"), "mlp"),
)


class Branch(NamedTuple):
    """A residual branch of a block.

    Attributes:
        path: dotted path of its module.
        role: `attn` or `mlp`.
        entry: dotted path of the norm in front of it in a pre-norm transformer block, else empty.
    """

    path: str
    role: str
    entry: str


def residual_branches(model: nn.Module, path: str) -> tuple[Branch, ...]:
    """The branches of a transformer block whose output is added to the residual stream: attention and MLP.

    A child counts by its name, and only when the block has one of each: the MLP of a ConvNeXt block is the whole block
    seen from inside. The norm in front of a branch is the child before it.
    """
    block = model.get_submodule(path)
    children = list(block.named_children())
    found: list[Branch] = []
    for i, (name, module) in enumerate(children):
        role = next((role for pattern, role in _BRANCHES if pattern.match(name)), "")
        if not role or host_of(module) is not None or not any(isinstance(m, nn.Linear) for m in module.modules()):
            continue
        before = host_of(children[i - 1][1]) if i else None
        entry = f"{path}.{children[i - 1][0]}" if before is not None and before.kind == "layer_norm" else ""
        found.append(Branch(f"{path}.{name}", role, entry))
    return tuple(found) if {b.role for b in found} == {"attn", "mlp"} else ()


def block_axis(model: nn.Module, path: str, trace: Trace) -> tuple[int, int] | None:
    """Channels and channel axis of a block's output; None when it is not one tensor of known layout.

    The channels are those of a host in the block; of sequences and vectors the last axis holds them. Maps are
    channels first when axis 1 has that size and the block takes a convolution, channels last otherwise.
    """
    block = model.get_submodule(path)
    hosts = [(m, host) for m in block.modules() if (host := host_of(m)) is not None]
    sizes = [_channels(m, host) for m, host in hosts if host.kind != "tokens"]
    has_map = any(host.axis == 1 for _, host in hosts)
    if not trace.watched:
        return (sizes[-1], 1 if has_map else -1) if sizes else None
    shape = trace.outputs.get(path)
    if shape is None or len(shape) < 2:
        return None
    if len(shape) <= 3:
        return (shape[-1], -1) if shape[-1] in sizes else None
    order = (1, -1) if has_map else (-1, 1)
    return next(((shape[axis], axis) for axis in order if shape[axis] in sizes), None)


def _channels(module: nn.Module, host: Host) -> int:
    weight = getattr(module, host.parameter)
    return int(weight.shape[0])
