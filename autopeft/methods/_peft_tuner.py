"""What there is to know of one adapter type of Hugging Face PEFT."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from autopeft.core.site import Site, Slot

__all__ = ["Gain", "Host", "Start", "Tuner", "host_kind"]

Host = Literal["linear", "pointwise", "conv", "grouped", "norm"]
"""What a site's module is to PEFT: a Linear, a 1x1 convolution, a larger one, one in groups, a LayerNorm."""

Gain = Literal["rank", "share", "rows", "all", "largest"]
"""How the captured energy is computed; see `HfPeft.gains`."""

Start = Literal["host", "generator", "data"]
"""What the tensors that an adapter starts from are computed of: the host's weight and fixed keys alone, a random draw,
or the training data."""


@dataclass(frozen=True, slots=True)
class Tuner:
    """One adapter type of PEFT.

    Attributes:
        config: name of its configuration class in `peft`.
        family: which learning rate it takes.
        hosts: the modules it works on.
        sizes: the sizes worth trying on a site, increasing; those that PEFT refuses or that cost no more are left out.
        settings: the configuration's fields that a size means on a site.
        size_fields: the fields that the size decides; the first one stands for it in messages.
        fixed: fields whose default is not PEFT's, so that the start is an identity and nothing is stored that can be
            computed again.
        touches: what it changes of its host.
        gain: how its captured energy is computed.
        start: what it starts from, when that changes the base's weight or must be kept.
        identity: whether it changes nothing at step 0.
        merges: whether it can be merged.
        same: whether it is right on convolutions that pad by themselves (`Conv2dSame`).
        dilated: whether it is right on dilated convolutions.
        single: whether PEFT computes parts of it in float32 whatever the precision of the model.
        shared: whether sites share one trained vector, so that it is offered on groups alone.
        derived: buffers that PEFT saves though they follow from the weight.
        cheaper: values of `fixed` fields that cost the same and spare the price a decomposition of the weight.
        count: trained scalars, where no field spares it; two tensors.
        refused: fields it cannot take, with the reason.
        note: what a reader should know besides.
    """

    config: str
    family: str
    hosts: frozenset[Host]
    sizes: Callable[[Site], Iterable[int]]
    settings: Callable[[Site, int], Mapping[str, Any]]
    size_fields: tuple[str, ...] = ("r",)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    touches: Literal["weight", "bias", "both", "output"] = "weight"
    gain: Gain = "share"
    start: Start = "generator"
    identity: bool = True
    merges: bool = True
    same: bool = False
    dilated: bool = True
    single: bool = False
    shared: bool = False
    derived: tuple[str, ...] = ()
    cheaper: Mapping[str, Any] = field(default_factory=dict)
    count: Callable[[Site, int], int] | None = None
    refused: Mapping[str, str] = field(default_factory=dict)
    note: str = ""

    def slots(self, site: Site) -> tuple[Slot, ...]:
        """The slots it occupies; empty where it does not work."""
        kind = host_kind(site)
        if kind is None or kind not in self.hosts or site.rows is not None:
            return ()
        wanted: tuple[Slot, ...] = {
            "weight": ("weight",),
            "bias": ("bias",),
            "both": ("weight", "bias") if site.has_bias else ("weight",),
            "output": ("output",),
        }[self.touches]
        return wanted if set(wanted) <= set(site.slots) else ()


def host_kind(site: Site) -> Host | None:
    """What a site's module is to PEFT; None for what it has no adapters for."""
    if site.kind == "linear":
        return "linear"
    if site.kind == "layer_norm":
        return "norm"
    if site.kind != "conv2d":
        return None
    if site.groups > 1:
        return "grouped"
    return "pointwise" if site.shape[2:] == (1, 1) else "conv"
