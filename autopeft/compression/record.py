"""`compress.json`: what a compression did and what it cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from autopeft.compression.settings import CompressionSettings

__all__ = ["CompressionRecord", "Form", "Step"]

Form = Literal["change", "tensors"]
"""What was compressed: the change of the model's own tensors or, for plans that cannot be merged, the adapters'
tensors."""


@dataclass(frozen=True, slots=True)
class Step:
    """The model after one step.

    Attributes:
        name: what was done.
        bytes: size of the file that holds it.
        loss: mean loss over the outer split.
        metrics: metrics on the outer split.
    """

    name: str
    bytes: int
    loss: float
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class CompressionRecord:
    """One compression from beginning to end; the same settings on the same source give the same file.

    Attributes:
        source: folder of the trained plan, relative to the folder of this file.
        trial: number of the trial in that run, None for its winner or for a trained plan.
        plan: digest of the plan.
        adapter_sha256: of the trained adapter's file.
        form: what was compressed.
        settings: as they were asked.
        steps: `trained` first.
        seen: whether the outer split, on which all is measured, was trained on; None when that is not known.
        sha256: of the compressed file.
        adapter_bytes: what the adapters' own tensors and the classifier take, uncompressed; autopeft alone reads them.
        q: tensor name to what its kept values were divided by.
        eta: the eta that was chosen for `darex-q-layer`.
        tried: what was tried for the divisor, `q` or `eta`, each with its objective.
        plain: the objective of the plain divisor, to compare these with.
        unseen: tensors that have the plain divisor because the mean of their input could not be measured.
        whole: weights that were not dropped from, because their change is stored in less already.
        difference: largest difference of a logit in a process without autopeft; None where only autopeft can load.
        reason: why the adapters' tensors were compressed instead of a change; empty for a change.
        environment: versions, device and threads.
    """

    source: str
    trial: int | None
    plan: str
    adapter_sha256: str
    form: Form
    settings: CompressionSettings
    steps: tuple[Step, ...]
    seen: bool | None
    sha256: str
    adapter_bytes: int
    q: Mapping[str, float] = field(default_factory=dict)
    eta: float | None = None
    tried: tuple[tuple[float, float], ...] = ()
    plain: float | None = None
    unseen: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()
    difference: float | None = None
    reason: str = ""
    environment: Mapping[str, Any] = field(default_factory=dict)

    SCHEMA: ClassVar[str] = "autopeft.compress/1"

    @property
    def increase(self) -> float:
        """How much higher the loss is at the end."""
        return self.steps[-1].loss - self.steps[0].loss
