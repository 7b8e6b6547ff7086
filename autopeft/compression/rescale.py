"""What the kept entries of every weight are divided by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from autopeft.compression.dare import Dropped
from autopeft.compression.darex import layer_q
from autopeft.compression.grid import coarse_to_fine
from autopeft.compression.settings import CompressionSettings

__all__ = ["Rescaling", "choose_rescaling"]

_ETAS = (0.1, 0.7)


@dataclass(frozen=True, slots=True)
class Rescaling:
    """The divisors, and how they were found.

    Attributes:
        q: tensor name to divisor.
        tried: what was tried: `q`, `eta`, or empty for nothing.
        trace: every value that was tried, with its mean objective.
        plain: the mean objective of the plain divisor `1 - drop`; None when nothing was tried.
        eta: the eta that was chosen, None where there is none.
        unseen: tensors that take the plain divisor because the mean of their input could not be measured.
    """

    q: Mapping[str, float]
    tried: str = ""
    trace: tuple[tuple[float, float], ...] = ()
    plain: float | None = None
    eta: float | None = None
    unseen: tuple[str, ...] = field(default=())

    @property
    def chosen(self) -> float | None:
        """The best mean objective that was found."""
        return min(value for _, value in self.trace) if self.trace else None


def choose_rescaling(
    draws: Sequence[Dropped],
    settings: CompressionSettings,
    objective: Callable[[Mapping[str, Tensor]], float],
    contributions: Mapping[str, Tensor],
) -> Rescaling:
    """Find the divisors that the settings ask for.

    `dare` divides by `1 - p`. `darex-q` tries values between `1 - p` and 1 for all weights alike, coarse to fine.
    `darex-q-layer` takes each weight's divisor from `darex.layer_q` and tries values of `eta` alone.

    Args:
        draws: the change, dropped with the seed that is kept and with others.
        settings: what is asked.
        objective: the loss, or the change of the output, of the model with these parts; smaller is better.
        contributions: for `darex-q-layer`: weight to `inputs.contributions`; weights that it lacks are divided by
            `1 - p`.
    """
    names, plain = tuple(draws[0].kept), 1.0 - draws[0].drop

    def mean(q: Mapping[str, float]) -> float:
        return sum(objective(draw.resolved(q)) for draw in draws) / len(draws)

    def by_layer(eta: float) -> dict[str, float]:
        return {
            name: layer_q(contributions[name], draws[0].drop, eta, rows=settings.rows).q
            if name in contributions
            else plain
            for name in names
        }

    if settings.rescale == "dare" or not names:
        return Rescaling(dict.fromkeys(names, plain))
    if settings.rescale == "darex-q":
        best, trace = coarse_to_fine(lambda q: mean(dict.fromkeys(names, q)), plain, 1.0)
        return Rescaling(dict.fromkeys(names, best), "q", trace, trace[0][1])
    unseen = tuple(name for name in names if name not in contributions)
    if settings.eta is not None:
        trace = ((settings.eta, mean(by_layer(settings.eta))),)
        best = settings.eta
    else:
        best, trace = coarse_to_fine(lambda eta: mean(by_layer(eta)), *_ETAS, points=7, rounds=2)
    return Rescaling(by_layer(best), "eta", trace, mean(dict.fromkeys(names, plain)), best, unseen)
