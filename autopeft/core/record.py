"""Everything a report needs to know about a run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from autopeft.core.outcome import Outcome

__all__ = ["Contender", "Record", "Role", "Standing", "Trial"]

Role = Literal["baseline", "default", "trial", "reference", "full", "repacked"]
"""`full` is the winner of short trials, trained in full at its learning rates or larger ones; `repacked` is the winner
with another plan from a third of its training on. A `reference` trains more than the budget: it is shown, never chosen
or exported, and no part of any verdict."""


@dataclass(frozen=True, slots=True)
class Standing:
    """How a contender was tuned, or why it did not compete.

    Attributes:
        reason: why it could not compete at this budget; empty when it did.
        note: what has to be said beside its result, such as that it exceeds the budget.
        variants: name of each variant to its reward after the short run at its best learning rate.
        tries: learning rates that every variant was tried at.
        sample_epochs: samples that the contender's own search has seen, tuning not counted.
    """

    reason: str = ""
    note: str = ""
    variants: Mapping[str, float] = field(default_factory=dict)
    tries: int = 0
    sample_epochs: int = 0

    @property
    def mean(self) -> float | None:
        """Mean reward of the variants; None when there are fewer than two."""
        values = list(self.variants.values())
        return sum(values) / len(values) if len(values) > 1 else None

    @property
    def deviation(self) -> float | None:
        """Standard deviation of the variants' rewards (n - 1); None when there are fewer than two."""
        mean = self.mean
        if mean is None:
            return None
        values = self.variants.values()
        return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))


@dataclass(frozen=True, slots=True)
class Trial:
    """One configuration that was tried.

    Attributes:
        number: number of the trial in the study, from 0.
        name: what a person calls it: `head only`, `uniform lora (attn)`, `default plan`, `trial 12`.
        role: `baseline`, `default` (our plan without any search), `trial`, `reference`, `full` or `repacked`.
        knobs: dotted path to value.
        digest: digest of the allocation.
        spent: cost in the budget's unit.
        mix: method to trainable scalars.
        outcome: what came of it.
        rewards: one number per goal; present exactly when the outcome is done.
        fidelity: sample-epochs seen.
        plan: path of the plan, relative to the run folder.
    """

    number: int
    name: str
    role: Role
    knobs: Mapping[str, Any]
    digest: str
    spent: int
    mix: Mapping[str, int]
    outcome: Outcome
    rewards: tuple[float, ...] = ()
    fidelity: int = 0
    plan: str = ""

    def __post_init__(self) -> None:
        if (self.outcome.status == "done") != bool(self.rewards):
            raise ValueError(f"trial {self.number} is {self.outcome.status} and has {len(self.rewards)} rewards")


@dataclass(frozen=True, slots=True)
class Contender:
    """One plan retrained at the end with several seeds.

    Attributes:
        name: as in its trial.
        trial: number of the trial it came from.
        role: `baseline`, `default` or `trial`.
        spent: cost in the budget's unit.
        outcomes: one per seed, on the split they were measured on.
        gain: mean paired difference winner minus this one over the seeds, in the search metric; 0 for the winner.
        interval: 95 % interval of that difference.
    """

    name: str
    trial: int
    role: Role
    spent: int
    outcomes: tuple[Outcome, ...]
    gain: float = 0.0
    interval: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Record:
    """One run from beginning to end.

    Attributes:
        run: path of the run folder, as it was given.
        study: the resolved study, as plain data.
        model: name, parameters, fingerprint and the like.
        data: class names, sizes of the splits, hash.
        budget: limit, unit, text and share.
        trials: every trial, by number.
        best: number of the winning trial, -1 when none is done.
        contenders: the winner first, then the baselines it is compared with.
        exports: format to path, relative to the run folder.
        costs: sample-epochs spent on scoring, search and finish, and one full training for comparison.
        environment: versions, device, threads.
        seconds: wall time per stage.
        search: how it was searched, as plain data: `goals` (a list of objects with `name` and `direction`), `mode`,
            `front` (numbers of the trials on it) and whatever else the search has to say of itself.
        standings: contender to how it was tuned, or why it did not compete.
    """

    run: str
    study: Mapping[str, Any]
    model: Mapping[str, Any]
    data: Mapping[str, Any]
    budget: Mapping[str, Any]
    trials: tuple[Trial, ...]
    best: int
    contenders: tuple[Contender, ...] = ()
    exports: Mapping[str, str] = field(default_factory=dict)
    costs: Mapping[str, float] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    search: Mapping[str, Any] = field(default_factory=dict)
    standings: Mapping[str, Standing] = field(default_factory=dict)

    SCHEMA: ClassVar[str] = "autopeft.record/1"
