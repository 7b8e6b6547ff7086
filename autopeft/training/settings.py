"""How the inner loop trains: epochs, learning rates per family, decay, warm-up, clipping, precision, threads."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

from autopeft.errors import UsageError

__all__ = ["Amp", "DecayRule", "HeadRule", "LearningRates", "RateRule", "TrainSettings"]

Amp = Literal["off", "bf16"]
"""Whether the forward pass runs under autocast to bfloat16. Parameters and optimiser state stay in float32."""

RateRule = Literal["none", "width", "spectral", "count"]
"""How a learning rate follows the size of what is trained; see `autopeft.training.rates.rate_factor`."""

HeadRule = Literal["none", "width"]
"""How the classifier's learning rate follows the width; see `autopeft.training.rates.head_factor`."""

DecayRule = Literal["none", "width"]
"""How weight decay follows the width; see `autopeft.training.rates.decay_factor`."""


def _check_number(name: str, value: object, low: float, high: float, *, open_low: bool = False) -> None:
    """Refuse a value that is no finite number in [low, high], or in (low, high] with `open_low`."""
    span = f"{'more than' if open_low else 'at least'} {low:g}" + (f" and at most {high:g}" if high < math.inf else "")
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UsageError(f"{name} must be a finite number, {span}, got {value!r}")
    if value < low or value > high or (open_low and value == low):
        raise UsageError(f"{name} must be {span}, got {value!r}")


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UsageError(f"{name} must be a whole number of at least 1, got {value!r}")


@dataclass(frozen=True, slots=True)
class LearningRates:
    """Peak learning rates of AdamW, one per family of methods and one for the classifier.

    The defaults are for short training of few parameters: a core matrix of some hundred entries between frozen
    orthonormal bases takes steps ten times those of the classifier.

    Attributes:
        head: the classifier, trained in full.
        matrix: low-rank factors (LoRA).
        core: small matrices between frozen bases.
        entries: single entries of weights and biases.
        vector: vectors: biases, norm affines, scales and shifts.
        adapter: bottleneck modules.
        tokens: class, position and prompt tokens.
        dense: whole weights (full fine-tuning).

    Raises:
        UsageError: when a rate is not a finite number above 0.
    """

    head: float = 1e-3
    matrix: float = 5e-3
    core: float = 2e-2
    entries: float = 5e-3
    vector: float = 5e-3
    adapter: float = 3e-3
    tokens: float = 5e-3
    dense: float = 5e-4

    FAMILIES: ClassVar[tuple[str, ...]] = ("matrix", "core", "entries", "vector", "adapter", "tokens", "dense")
    """The families a method may belong to."""

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            _check_number(f"the learning rate lr.{f.name}", getattr(self, f.name), 0.0, math.inf, open_low=True)

    def of(self, family: str) -> float:
        """The learning rate of a family of methods, or of `head`.

        Raises:
            UsageError: for a family nobody knows.
        """
        if family != "head" and family not in self.FAMILIES:
            raise UsageError(
                f"no learning rate exists for the family {family!r}; a method's family is one of "
                f"{', '.join(self.FAMILIES)}"
            )
        rate: float = getattr(self, family)
        return rate

    def scaled(self, factor: float) -> LearningRates:
        """The same rates with every family multiplied by `factor`; the head's stays as it is.

        All plans share one head, and a head that were trained at another rate would confound their comparison.
        """
        _check_number("the factor of the learning rates", factor, 0.0, math.inf, open_low=True)
        return dataclasses.replace(self, **{name: getattr(self, name) * factor for name in self.FAMILIES})


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """Settings of the inner loop; two trainings with equal settings, plan, data and seed are equal.

    Attributes:
        epochs: passes over the training split; the schedule is over all of them, also when training stops at a rung.
        data_fraction: share of the training split that an epoch visits, in (0, 1]; another random share each time.
            Large data sets are searched in such short epochs, so that a bad trial need not see all of it once.
        lr: peak learning rates.
        lr_scale: multiplies every rate of `lr` but the head's.
        rate_rule: how the rates of the families follow the size of what is trained: `none`, `width`, `spectral` or
            `count`; see `autopeft.training.rates.rate_factor`.
        head_rule: how the head's rate follows the model's width: `none` or `width`.
        lora_plus: ratio of the rate of B to that of A in low-rank pairs (LoRA+; Hayou et al., 2024, arXiv 2402.12354,
            section 4.2); B takes the ratio and A stays.
        weight_decay: decoupled decay of tensors with two or more dimensions; vectors and scalars are not decayed.
        decay_rule: how weight decay follows the width: `none` or `width`; see `autopeft.training.rates.decay_factor`.
        warmup_fraction: share of the steps in which the rate rises linearly from 0, in [0, 1].
        clip: largest norm of the whole gradient; 0 does not clip.
        betas: AdamW's decay rates of the first and second moment.
        eps: AdamW's epsilon.
        amp: precision of the forward pass.
        threads: torch threads; when None the pipeline chooses once per run, from the model's size and the load.

    Raises:
        UsageError: naming the field and the value that is out of range.
    """

    epochs: int = 15
    data_fraction: float = 1.0
    lr: LearningRates = field(default_factory=LearningRates)
    lr_scale: float = 1.0
    rate_rule: RateRule = "spectral"
    head_rule: HeadRule = "none"
    lora_plus: float = 1.0
    weight_decay: float = 1e-4
    decay_rule: DecayRule = "none"
    warmup_fraction: float = 0.1
    clip: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    amp: Amp = "off"
    threads: int | None = None

    def __post_init__(self) -> None:
        _check_count("train.epochs", self.epochs)
        _check_number("train.data_fraction", self.data_fraction, 0.0, 1.0, open_low=True)
        if not isinstance(self.lr, LearningRates):
            raise UsageError(f"train.lr must hold one learning rate per family, got {self.lr!r}")
        _check_number("train.lr_scale", self.lr_scale, 0.0, math.inf, open_low=True)
        for name, kinds in (("rate_rule", RateRule), ("head_rule", HeadRule), ("decay_rule", DecayRule)):
            if getattr(self, name) not in get_args(kinds):
                raise UsageError(
                    f"train.{name} must be one of {', '.join(get_args(kinds))}, got {getattr(self, name)!r}"
                )
        _check_number("train.lora_plus", self.lora_plus, 0.0, math.inf, open_low=True)
        _check_number("train.weight_decay", self.weight_decay, 0.0, math.inf)
        _check_number("train.warmup_fraction", self.warmup_fraction, 0.0, 1.0)
        _check_number("train.clip", self.clip, 0.0, math.inf)
        _check_number("train.eps", self.eps, 0.0, math.inf, open_low=True)
        if len(self.betas) != 2:
            raise UsageError(f"train.betas must hold two numbers, got {self.betas!r}")
        for i, beta in enumerate(self.betas):
            _check_number(f"train.betas[{i}]", beta, 0.0, 1.0)
            if beta == 1.0:
                raise UsageError(f"train.betas[{i}] must be below 1, got {beta!r}")
        if self.amp not in get_args(Amp):
            raise UsageError(f"train.amp must be one of {', '.join(get_args(Amp))}, got {self.amp!r}")
        if self.threads is not None:
            _check_count("train.threads", self.threads)

    @property
    def rates(self) -> LearningRates:
        """The learning rates in force: `lr` with `lr_scale` applied."""
        return self.lr.scaled(self.lr_scale)
