"""What a module is and what it does, from its class and its name."""

from __future__ import annotations

import re
from typing import NamedTuple

from timm.layers import LayerScale, LayerScale2d
from torch import Tensor, nn

from autopeft.core.site import Kind

__all__ = ["Host", "fused_rows", "held", "host_of", "is_activated", "role_of"]

_GAMMA = re.compile(r"^(gamma|ls|layer_?scale)_?\d*$")
_TOKENS = re.compile(r"(tokens?|pos_embed\w*|position_embeddings?|positional_embedding)$")
_RELATIVE = re.compile(r"rel\w*pos\w*|relative_position\w*")

_ROLES: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"(^|\.)(qkv|wqkv|in_proj|c_attn)$"), "attn.qkv"),
    (re.compile(r"(^|\.)(q|q_proj|query|wq|to_q)$"), "attn.q"),
    (re.compile(r"(^|\.)(k|k_proj|key|wk|to_k)$"), "attn.k"),
    (re.compile(r"(^|\.)(v|v_proj|value|wv|to_v)$"), "attn.v"),
    (re.compile(r"(^|\.)upsamplers(\.|$)"), "upsample"),
    (re.compile(r"(^|\.)ff\.net\.0\.proj$"), "mlp.fc1"),
    (re.compile(r"(^|\.)ff\.net\.2$"), "mlp.fc2"),
    (re.compile(r"(^|\.)(time_embedding|time_emb_proj|timestep_embedder|adaln_single|norm\d*\.linear)(\.|$)"),
     "time"),
    (re.compile(r"(^|\.)(\w*attn\w*|\w*attention\w*|mixer|token_mixer)\.(\w+\.)*(proj|out_proj|o_proj|dense|to_out)(\.0)?$"),
     "attn.proj"),
    (re.compile(r"(^|\.)(fc1|fc1_g|fc1_x|w1|w2|w12|lin1|gate_proj|up_proj)$"), "mlp.fc1"),
    (re.compile(r"(^|\.)(fc2|w3|lin2|down_proj)$"), "mlp.fc2"),
)  # fmt: skip
_STEM = re.compile(r"^(stem\w*|patch_embed|conv_stem|conv1|conv_in|pos_embed\.proj|features\.conv0)(\.|$)")
_DOWNSAMPLE = re.compile(r"(^|\.)(downsample\w*|reduction|shortcut|conv_shortcut)(\.|$)")


class Host(NamedTuple):
    """What a module of a known class offers.

    Attributes:
        kind: kind of the site.
        parameter: name of the tensor that slot `weight` (or `tokens`) means.
        axis: axis of the module's output that the rows of the weight index, as far as the class tells.
        groups: groups of a convolution.
    """

    kind: Kind
    parameter: str = "weight"
    axis: int = -1
    groups: int = 1


def host_of(module: nn.Module) -> Host | None:
    """What a module is as a host of adapters; None when it is none by itself.

    Norms other than LayerNorm and BatchNorm (GroupNorm, RMSNorm) count as `layer_norm`: a scale, perhaps a shift, per
    channel. Norms without a scale, or over several axes, are none.
    """
    weight = getattr(module, "weight", None)
    name = type(module).__name__
    if isinstance(module, nn.Linear):
        return Host("linear") if weight is not None else None
    if isinstance(module, nn.Conv2d):
        return Host("conv2d", axis=1, groups=module.groups)
    if isinstance(module, LayerScale2d):
        return Host("layer_scale", "gamma", axis=1)
    if isinstance(module, LayerScale):
        return Host("layer_scale", "gamma")
    if isinstance(module, nn.Embedding):
        return Host("tokens")
    if not isinstance(weight, nn.Parameter) or weight.ndim != 1:
        return None
    if isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm) or "BatchNorm" in name:
        return Host("batch_norm", axis=1)
    if isinstance(module, nn.GroupNorm):
        return Host("layer_norm", axis=1)
    if isinstance(module, nn.LayerNorm) or re.search(r"(Layer|RMS|Rms)Norm", name):
        return Host("layer_norm", axis=1 if "2d" in name else -1)
    return None


def is_activated(module: nn.Module) -> bool:
    """Whether a norm applies an activation after its scale (timm's BatchNormAct2d and the like)."""
    act = getattr(module, "act", None)
    return isinstance(act, nn.Module) and not isinstance(act, nn.Identity)


def held(name: str, parameter: Tensor) -> Host | None:
    """What a parameter is that a module holds directly: a layer scale, tokens, or nothing that adapters go on."""
    if _GAMMA.match(name) and parameter.ndim == 1:
        return Host("layer_scale", name)
    if _RELATIVE.search(name):
        return Host("tokens", name)
    if parameter.ndim >= 2 and (_TOKENS.search(name) or (parameter.ndim >= 3 and parameter.shape[0] == 1)):
        return Host("tokens", name)
    return None


def role_of(name: str, kind: Kind, in_block: bool, parameter: str) -> str:
    """The role of a host.

    Args:
        name: dotted path of the module.
        kind: what it is.
        in_block: whether it lies in a residual block.
        parameter: name of the parameter, for one that a module holds directly.
    """
    if kind in ("layer_norm", "batch_norm"):
        return "norm"
    if kind in ("layer_scale", "block"):
        return kind
    if kind == "tokens":
        return "other" if _RELATIVE.search(parameter) else "tokens"
    if not in_block and _STEM.search(name):
        return "stem"
    if _DOWNSAMPLE.search(name):
        return "downsample"
    for pattern, role in _ROLES:
        if pattern.search(name):
            return role
    return "conv" if kind == "conv2d" else "other"


def fused_rows(name: str, module: nn.Linear, parent: nn.Module) -> dict[str, tuple[int, int]]:
    """Rows of q, k and v in a fused projection; empty when the module is none or its layout is another.

    The layout is that of `reshape(B, N, 3, heads, head_dim)`: all of q, then all of k, then all of v. Attention that
    interleaves them by head (MaxViT with heads first, TinyViT, EfficientFormer) stays whole.
    """
    if name.rpartition(".")[2].lower() not in ("qkv", "wqkv"):
        return {}
    if getattr(parent, "head_first", False) or hasattr(parent, "val_dim"):
        return {}
    n_out, n_in = module.weight.shape
    heads = getattr(parent, "num_heads", None) or getattr(parent, "heads", None)
    width = getattr(parent, "head_dim", None)
    by_heads = 3 * heads * width if isinstance(heads, int) and isinstance(width, int) else None
    if n_out % 3 or n_out not in (3 * n_in, by_heads):
        return {}
    third = n_out // 3
    return {part: (i * third, (i + 1) * third) for i, part in enumerate("qkv")}
