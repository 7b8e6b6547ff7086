"""How a trained change is compressed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from autopeft.compression.darex import Rows
from autopeft.compression.quantise import Codes
from autopeft.errors import UsageError
from autopeft.methods.codes import MOST_BITS

__all__ = ["Choose", "ChooseOn", "CompressionSettings", "Of", "Rescale"]

Of = Literal["change", "adapters"]
"""What is compressed: the change of the model's own tensors, which timm alone can apply, or the adapters' own tensors,
which are fewer for some methods and need autopeft."""

Rescale = Literal["dare", "darex-q", "darex-q-layer"]
"""What kept entries are divided by: `1 - drop`; one `q` for the whole model, found by trying; one `q` per layer, in
closed form, with one number `eta` found by trying."""

Choose = Literal["loss", "output"]
"""What `q` or `eta` is chosen by: the loss, or, without labels, the mean absolute change of the model's output."""

ChooseOn = Literal["inner", "outer"]
"""The split it is chosen on."""


@dataclass(frozen=True, slots=True)
class CompressionSettings:
    """Dropping, then codes of few bits, either or both.

    Attributes:
        of: what is compressed; a plan that cannot be merged is no change, so its adapters' tensors are taken.
        drop: share of the entries of each changed weight that is dropped at random; None drops none.
        rescale: what the others are divided by.
        choose: what `q` and `eta` are chosen by.
        choose_on: the split that they are chosen on. The outer one is what choices are made by everywhere; the loss
            that is then measured on it is a little too good. On the inner one, which was trained on, the loss is so
            small that `1 - drop` nearly always wins.
        samples: samples that they are chosen on.
        draws: random draws that they are chosen over, the one that is kept among them.
        eta: parameter of `darex-q-layer`; None tries values from 0.1 to 0.7.
        rows: how the closed form takes a row's expected change.
        even_larger: drop also where what is left takes more room than the low-rank factors it was.
        bits: bits per stored value; None keeps 32.
        codes: what the bits stand for.
        head: give the classifier codes too.
        seed: seed of the draw.
        max_loss_increase: refuse a result whose loss on the outer split is higher by more; infinity refuses none.

    Raises:
        UsageError: naming the setting and the value that is out of range.
    """

    of: Of = "change"
    drop: float | None = None
    rescale: Rescale = "dare"
    choose: Choose = "loss"
    choose_on: ChooseOn = "outer"
    samples: int = 256
    draws: int = 2
    eta: float | None = None
    rows: Rows = "signed"
    even_larger: bool = False
    bits: int | None = None
    codes: Codes = "lloyd"
    head: bool = False
    seed: int = 0
    max_loss_increase: float = 0.1

    SCHEMA: ClassVar[str] = "autopeft.compression/1"

    def __post_init__(self) -> None:
        if self.drop is None and self.bits is None:
            raise UsageError("nothing to do: give --drop (such as 0.9), --bits (such as 4), or both")
        if self.drop is not None and not 0 < self.drop < 1:
            raise UsageError(f"drop is the share of entries to drop, above 0 and below 1, got {self.drop!r}")
        if self.bits is not None and not 1 <= self.bits <= MOST_BITS:
            raise UsageError(f"bits must lie between 1 and {MOST_BITS}, got {self.bits!r}")
        for name, kind in (
            ("of", Of),
            ("rescale", Rescale),
            ("choose", Choose),
            ("choose_on", ChooseOn),
            ("rows", Rows),
            ("codes", Codes),
        ):
            if getattr(self, name) not in get_args(kind):
                raise UsageError(f"{name} must be one of {', '.join(get_args(kind))}, got {getattr(self, name)!r}")
        if self.drop is not None and self.of == "adapters":
            raise UsageError("entries are dropped from a change of the model's own tensors; leave --drop or --of out")
        if self.drop is None and self.rescale != "dare":
            raise UsageError(f"rescale {self.rescale} says what is done after dropping; give --drop too")
        for name in ("samples", "draws"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, got {getattr(self, name)!r}")
        if self.eta is not None and not (math.isfinite(self.eta) and self.eta > 0):
            raise UsageError(f"eta must be above 0, got {self.eta!r}; values from 0.1 to 0.7 are usual")
        if math.isnan(self.max_loss_increase):
            raise UsageError("max_loss_increase must be a number; inf refuses nothing")

    @property
    def steps(self) -> tuple[str, ...]:
        """What is done, in order, in a few words each."""
        found = []
        if self.drop is not None:
            found.append(f"drop {self.drop:g}, {self.rescale}")
        if self.bits is not None:
            found.append(f"{self.bits} bit{'s' if self.bits > 1 else ''}, {self.codes}")
        return tuple(found)

    @property
    def slug(self) -> str:
        """A folder's name that tells these settings from others of the same run."""
        parts = []
        if self.drop is not None:
            parts += [f"drop{self.drop:g}", self.rescale]
        if self.bits is not None:
            parts += [f"{self.bits}bit", self.codes, *(["head"] if self.head else [])]
        if self.of != "change":
            parts.append(self.of)
        return "-".join([*parts, f"seed{self.seed}"])
