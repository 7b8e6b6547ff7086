"""Named groups of sites that masks are spoken of in."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import groupby

from autopeft.allocation._roles import ROLE_GROUPS, role_group
from autopeft.core.site import Site

__all__ = ["LAYOUTS", "Groups", "Layout", "matches"]

Groups = Mapping[str, Sequence[str]]
"""Name of a group to patterns of the names of its sites."""

_BRANCHES = ("to_q", "to_k", "to_v", "to_out.0")


@dataclass(frozen=True, slots=True)
class Layout:
    """What the bits of a mask are, and what a mask leaves alone.

    Attributes:
        groups: sites of a menu to the groups, in the order of the bits.
        methods: method key to patterns of the sites it goes on; none takes every method of the menu, on every site.
        masked: methods that a bit switches; none takes all of `methods`.
        outside: whether masked methods are bought on sites of no group as well.
    """

    groups: Callable[[Iterable[Site]], Groups]
    methods: Groups = field(default_factory=dict)
    masked: tuple[str, ...] = ()
    outside: bool = False


def matches(site: Site, patterns: Iterable[str]) -> bool:
    """Whether a site is named by one of the patterns: its very name, or a shell pattern (`blocks.[0-5].*`).

    A group of sites that one option changes together (`block:3`) is meant only by patterns with a colon, so that `*`
    means every single site.
    """
    name = site.name
    meant = [p for p in patterns if site.kind != "group" or ":" in p]
    return name in meant or any(fnmatchcase(name, p) for p in meant)


def _blocks(sites: Iterable[Site]) -> Groups:
    """Every residual block with what lies in it: `block0`, `block1`, ..."""
    return {f"block{b.depth}": _inside(b.name, f"block:{b.depth}") for b in _block_sites(sites)}


def _stages(sites: Iterable[Site]) -> Groups:
    """Runs of blocks of one width: `stage0`, `stage1`, ..."""
    runs = [list(run) for _, run in groupby(_block_sites(sites), key=lambda b: b.shape)]
    return {
        f"stage{i}": tuple(p for b in run for p in _inside(b.name, f"block:{b.depth}")) for i, run in enumerate(runs)
    }


def _attention(sites: Iterable[Site]) -> Groups:
    """Every attention module: `attention0`, `attention1`, ..."""
    found = {s.module.rpartition(".")[0]: s.depth for s in sites if s.role in ("attn.qkv", "attn.q")}
    ordered = sorted(found, key=lambda name: (found[name], _natural(name)))
    return {f"attention{i}": _inside(name) for i, name in enumerate(ordered)}


def _roles(sites: Iterable[Site]) -> Groups:
    """Kinds of sites: `qkv`, `proj`, `mlp`, `norm`, `conv`, `other`, as far as there are any."""
    found: dict[str, list[str]] = {role: [] for role in ROLE_GROUPS}
    for site in sorted(sites, key=lambda s: _natural(s.name)):
        if site.kind not in ("block", "residual", "group"):
            found[role_group(site)].append(site.name)
    return {role: tuple(names) for role, names in found.items() if names}


_UNET_SITE = re.compile(r"^(?:(down|up)_blocks\.(\d+)|(mid)_block)\.attentions\.(\d+)\.(?:transformer_blocks\.)?")


def _unet(attentions_up: int, inside: str) -> Callable[[Iterable[Site]], Groups]:
    """Attention modules of a diffusers U-Net, in MemControl's order: `down0_0`, ..., `mid0`, `up1_0`, ...

    Args:
        attentions_up: attentions of an up block that have a bit; the released code gives the third none in two of its
            three modes.
        inside: pattern of what a bit switches, below `transformer_blocks`, where attentions have some; in a
            `UNet2DModel` they have none, and the pattern is of the attention itself.
    """

    def groups(sites: Iterable[Site]) -> Groups:
        found: dict[tuple[int, int, int], tuple[str, str]] = {}
        known = {site.name for site in sites}
        deep = any(".transformer_blocks." in name for name in known)
        for name in known:
            place = _UNET_SITE.match(name)
            if place is None or (deep and not place[0].endswith("transformer_blocks.")):
                continue
            side, block, mid, index = place[1], int(place[2] or 0), place[3], int(place[4])
            if side == "up" and index >= attentions_up:
                continue
            bit = f"mid{index}" if mid else f"{side}{block}_{index}"
            order = {"down": 0, None: 1, "up": 2}[side]
            found[order, block, index] = bit, place[0] + inside
        return {bit: (pattern,) for _, (bit, pattern) in sorted(found.items())}

    return groups


LAYOUTS: Mapping[str, Layout] = {
    "blocks": Layout(_blocks),
    "stages": Layout(_stages),
    "attention": Layout(_attention),
    "roles": Layout(_roles),
    "unet_attention": Layout(_unet(10**9, "*")),
    "memcontrol_svdiff": Layout(_unet(2, "*"), {"svdiff": ("*",)}, ("svdiff",), outside=True),
    "memcontrol_difffit": Layout(
        _unet(2, "*"),
        {
            "gamma": (
                *(f"*.transformer_blocks.*.attn?.{name}" for name in _BRANCHES),
                *(f"*.transformer_blocks.*.{name}" for name in ("attn1", "attn2", "ff")),
            ),
            "norm": ("*",),
            "bias": ("*",),
        },
        ("gamma",),
        outside=True,
    ),
    "memcontrol_attention": Layout(_unet(10**9, "*.attn?.*"), {"full": ("*.attentions.*",)}, ("full",), outside=True),
}
"""Name of a layout to it.

The last three are those of MemControl (Dutt et al., 2024, arXiv 2405.19458) on U-Nets of the shape of Stable Diffusion
1.5, with 13, 13 and 16 bits, by exact sets of sites where the released code asks for pieces of names.
"""


def _block_sites(sites: Iterable[Site]) -> list[Site]:
    return sorted((s for s in sites if s.kind == "block"), key=lambda b: (b.depth, _natural(b.name)))


def _inside(path: str, *more: str) -> tuple[str, ...]:
    return (path, f"{path}.*", *more)


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts `blocks.10` behind `blocks.9`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
