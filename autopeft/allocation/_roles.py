"""Kinds of sites that corrections and uniform plans are spoken of in."""

from __future__ import annotations

from autopeft.core.site import Site

__all__ = ["ROLE_GROUPS", "role_group"]

ROLE_GROUPS = ("qkv", "proj", "mlp", "norm", "conv", "other")


def role_group(site: Site) -> str:
    """The group of a site: `qkv`, `proj`, `mlp`, `norm`, `conv` or `other`.

    A role that names an attention projection or an MLP wins over the kind of the host, so that a 1 x 1 convolution
    that serves as `mlp.fc1` counts as `mlp`.
    """
    head, _, tail = site.role.partition(".")
    if head == "attn":
        return "proj" if tail in ("proj", "out", "o") else "qkv" if tail in ("qkv", "q", "k", "v", "kv") else "other"
    if head == "mlp":
        return "mlp"
    if head == "norm" or site.kind in ("layer_norm", "batch_norm"):
        return "norm"
    if head == "conv" or site.kind == "conv2d":
        return "conv"
    return "other"
