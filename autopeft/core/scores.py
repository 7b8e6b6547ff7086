"""What one pass over the data knows about the model: evidence per tensor, scores per place."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from autopeft.core.site import Place, Site
from autopeft.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Evidence", "ScoreOrigin", "Scores", "TensorEvidence"]


@dataclass(frozen=True, slots=True, eq=False)
class TensorEvidence:
    """What is known about one tensor (or the rows of one, for a slice); all tensors have the site's shape, on the CPU.

    Attributes:
        value: the pre-trained tensor. For slot `output` of a block: empty.
        signal: signed; its square, entry by entry, is the energy that gains are computed from. The mean gradient,
            possibly preconditioned, for gradient scorers. For slot `output` of a block: the (channels, channels)
            matrix `sum over tokens of dL/dy y^T`.
        score: not negative; what thresholds (SPT) rank entries by. The sum of squared gradients for SPT.
        half_a: mean gradient over the first half of the batches, where kept.
        half_c: mean gradient over the second half, where kept.
        square: second moment: mean of the squared gradients, where kept.
        bases: name (`activation`, `aligned`, `trajectory`) to orthonormal bases measured on the data, best first:
            (out_features, n) and (in_features, n), float32. Only those that a method of the study asks for.
        memory: how memorisation changes, in the coordinates of the signal, where measured; `ScoreOrigin.memory` says of
            what. Of a measure M: its gradient, so that a step that captures a part c of the signal changes M by
            `-<c, memory>`. Of the gap between two halves: the signal of the first half less that of the second.
    """

    value: Tensor
    signal: Tensor
    score: Tensor
    half_a: Tensor | None = None
    half_c: Tensor | None = None
    square: Tensor | None = None
    bases: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    memory: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Evidence:
    """What is known about one site: one `TensorEvidence` per slot (`weight`, `bias`, `tokens`, `output`).

    Attributes:
        site: the site.
        slots: slot to what is known; a residual branch shares what is known of its block's output.
        members: on a group, name of a member to what is known about it.
    """

    site: Site
    slots: Mapping[str, TensorEvidence]
    members: Mapping[str, Evidence] = field(default_factory=dict)

    def __getitem__(self, slot: str) -> TensorEvidence:
        if slot not in self.slots:
            raise UsageError(f"the scorer kept nothing for slot {slot!r} of {self.site.name}")
        return self.slots[slot]

    def get(self, slot: str) -> TensorEvidence | None:
        """The evidence of a slot, or None."""
        return self.slots.get(slot)


@dataclass(frozen=True, slots=True)
class ScoreOrigin:
    """What scores were made from; scores of another model, head or data set must not be used.

    Attributes:
        scorer: name of the scorer with its settings.
        n_samples: samples that were looked at.
        catalog: fingerprint of the catalogue.
        weights: hash of the base weights.
        head: hash of the head that gradients were taken through.
        data: hash of the samples that were looked at.
        seconds: time the scoring took.
        memory: what the evidence's `memory` is about: `noise_difference`, `gap`, or empty where there is none.
        memory_samples: passes of a sample through the model that measuring it took besides `n_samples`.
    """

    scorer: str
    n_samples: int
    catalog: str
    weights: str = ""
    head: str = ""
    data: str = ""
    seconds: float = 0.0
    memory: str = ""
    memory_samples: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """Scores of every place of a catalogue.

    Attributes:
        origin: what they were made from.
        totals: per place the sum of the entries' `score`; finite and not negative.
        evidence: per site name what is known about its tensors. Slices of a fused projection are views of the whole.
    """

    origin: ScoreOrigin
    totals: Mapping[Place, float]
    evidence: Mapping[str, Evidence] = field(default_factory=dict)

    SCHEMA: ClassVar[str] = "autopeft.scores/1"

    def __post_init__(self) -> None:
        for place, value in self.totals.items():
            if not math.isfinite(value) or value < 0:
                raise ValueError(f"the score of {place} must be finite and not negative, got {value}")

    def check(self, origin: ScoreOrigin) -> None:
        """Refuse scores that were made from another model, head or data set.

        Raises:
            UsageError: naming what differs.
        """
        for name in ("catalog", "weights", "head", "data"):
            mine, theirs = getattr(self.origin, name), getattr(origin, name)
            if mine and theirs and mine != theirs:
                raise UsageError(f"these scores belong to another {name}: they were made from {mine}, this is {theirs}")

    def about(self, site: Site) -> Evidence | None:
        """What is known about a site; of a group, about its members. None when nothing was kept."""
        if site.kind != "group":
            return self.evidence.get(site.name)
        members = {m.name: self.evidence[m.name] for m in site.members if m.name in self.evidence}
        return Evidence(site, {}, members) if members else None
