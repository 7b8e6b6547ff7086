"""Bytes of what is trained as a goal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from autopeft.rewards._measured import Measured
from autopeft.rewards._pick import Direction
from autopeft.rewards._studio import Studio

__all__ = ["Bytes"]


@dataclass(frozen=True, slots=True)
class Bytes(Measured):
    """Bytes of the trained tensors as they lie in memory, the head's included, each storage once.

    Packed methods store fewer in their export; a budget in `bytes` limits that file exactly.
    """

    direction: ClassVar[Direction] = "minimize"

    @property
    def metric(self) -> str:
        """`bytes`."""
        return "bytes"

    def look(self, studio: Studio) -> Mapping[str, float]:
        """As the class says."""
        trained = {id(p): p.numel() * p.element_size() for p in studio.model.parameters() if p.requires_grad}
        return {"bytes": float(sum(trained.values()))}
