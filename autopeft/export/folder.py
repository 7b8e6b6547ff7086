"""Which PEFT folder an option could be part of, known from what it builds, before there is a plan."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from autopeft.export._low_rank import why_not_low_rank
from autopeft.export._peft_types import typed_kind
from autopeft.methods.base import Adapter, Part, Shared
from autopeft.methods.peft_adapter import PeftAdapter

__all__ = ["LORA", "Folder"]

LORA = "lora"
"""The kind of folder that holds low-rank changes as LoRA."""


@dataclass(frozen=True, slots=True)
class Folder:
    """What `PeftExport` could do with one option.

    A plan whose options have a kind in common can be written as one folder of this kind: `lora`, or a type of PEFT with
    the settings that PEFT has once for all layers.

    Attributes:
        kinds: the kinds of folder that can hold it; empty when none can.
        ranks: dotted path of a host to the rank that the option takes there, where it has one. Options on slices of one
            host add up.
    """

    kinds: frozenset[str] = frozenset()
    ranks: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, part: Part, model: nn.Module) -> Folder:
        """The folders for what an option has built.

        Args:
            part: what `Method.build` returned.
            model: the model that it was built for.
        """
        adapters = part.adapters() if isinstance(part, Shared) else [part] if isinstance(part, Adapter) else []
        kinds: set[str] = set()
        ranks: dict[str, int] = {}
        if adapters and not any(why_not_low_rank(model, adapter) for adapter in adapters):
            kinds.add(LORA)
            for adapter in adapters:
                pair = adapter.low_rank()
                assert pair is not None
                ranks[adapter.site.module] = ranks.get(adapter.site.module, 0) + int(pair[0].shape[0])
        if isinstance(part, PeftAdapter) and (common := typed_kind(part)) is not None:
            kinds.add(f"{part.tuner} {json.dumps(common, sort_keys=True, default=str)}")
            if LORA not in kinds and isinstance(part.settings.get("r"), int):
                ranks[part.site.module] = part.settings["r"]
        return cls(frozenset(kinds), ranks)
