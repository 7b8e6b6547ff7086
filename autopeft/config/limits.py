"""What a plan must keep besides its budget: the format it leaves in, and what a training step may take."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator

from autopeft.errors import UsageError

__all__ = ["LimitSettings", "Target"]

Target = Literal["any", "timm", "peft", "lora"]
"""The formats that a plan can be kept to."""

_AMOUNT = re.compile(r"^\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*$")
_FLOPS: Mapping[str, float] = MappingProxyType({"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15})
_BYTES: Mapping[str, float] = MappingProxyType({"B": 1.0, "KB": 1e3, "MB": 1e6, "GB": 1e9})


def _as_text(value: Any) -> Any:
    """FLOPs without a suffix are a number in YAML; as a value they are text."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return f"{value:.0f}" if is_number else value


@dataclass(frozen=True, slots=True)
class LimitSettings:
    """What a plan must keep besides its budget.

    Attributes:
        target: format that every plan must be able to leave in: `any`; `timm`, merged into a plain checkpoint; `peft`,
            one PEFT folder of one type; `lora`, one PEFT folder of LoRA.
        max_rank: largest rank of the low-rank changes of a layer, for servers that have one; ranks of the slices of a
            fused projection add up. Changes that are not of low rank are not concerned.
        max_flops: floating-point operations of a training step, such as `1.5T`.
        max_memory: bytes that a training step keeps for its backward pass, such as `200MB` (MB = 1,000,000 bytes).

    Raises:
        UsageError: naming the field and the value that is out of range.
    """

    target: Target = "any"
    max_rank: int | None = None
    max_flops: Annotated[str | None, BeforeValidator(_as_text)] = None
    max_memory: str | None = None

    def __post_init__(self) -> None:
        known = get_args(Target)
        if self.target not in known:
            raise UsageError(f"limits.target must be one of {', '.join(known)}, got {self.target!r}")
        rank = self.max_rank
        if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
            raise UsageError(f"limits.max_rank must be a whole number of at least 1, got {rank!r}")
        self.flops  # noqa: B018 - amounts that cannot be read are refused now
        self.memory  # noqa: B018 - as above

    @property
    def flops(self) -> float | None:
        """`max_flops` as a number."""
        return _number("limits.max_flops", self.max_flops, _FLOPS, "1.5T")

    @property
    def memory(self) -> float | None:
        """`max_memory` in bytes."""
        return _number("limits.max_memory", self.max_memory, _BYTES, "200MB")


def _number(name: str, text: str | None, suffixes: Mapping[str, float], example: str) -> float | None:
    if text is None:
        return None
    match = _AMOUNT.match(text)
    scale = suffixes.get(match[2].upper()) if match else None
    if match is None or scale is None or not float(match[1]) > 0:
        known = ", ".join(filter(None, suffixes))
        raise UsageError(f"{name} must be a number above 0 with one of {known}, such as {example}, got {text!r}")
    return float(match[1]) * scale
