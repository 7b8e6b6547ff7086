"""Competitions: sites that win and lose shares of one budget while they train."""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping, Sequence
from fractions import Fraction

import torch
from torch import Tensor, nn

from autopeft.core.site import Site
from autopeft.errors import UsageError
from autopeft.methods.base import Shared

__all__ = ["Clock", "Competing", "Importance", "check_clock", "cubic", "proportional", "share_out"]


def cubic(step: int, first: int, last: int, start: int, end: int) -> int:
    """`end + (start - end) (1 - (step - first) / (last - first))^3`, rounded down: exact, in whole numbers.

    The schedule of AdaLoRA (Zhang et al., 2023, arXiv 2303.10512, equation 10) and SNELLA. `start` up to step `first`,
    `end` from step `last` on.

    Args:
        step: steps taken so far.
        first: last step at which the budget is `start`.
        last: first step at which it is `end`; not before `first`.
        start: budget at the start, at least `end`.
        end: budget at the end.
    """
    if step >= last:
        return end
    if step <= first:
        return start
    return end + (start - end) * (last - step) ** 3 // (last - first) ** 3


def share_out(
    scores: Sequence[float], caps: Sequence[int], volume: int, floors: Sequence[int] | None = None
) -> tuple[int, ...]:
    """Share out whole numbers in proportion to scores, none above its cap: water-filling, exact.

    `n_i = min(cap_i, level * score_i)` with the one level at which they add up to the volume, rounded by largest
    remainder; equal remainders go to the larger score, then the larger cap, then the first. Where the scored ones are
    full, the rest goes to the others by cap. Scores that are negative or no numbers count as 0; if all are 0, the caps
    take their place. Multiplying all scores by one number changes nothing, and permuting the members permutes the
    result.

    Args:
        scores: of each member.
        caps: the most each can take, at least 0.
        volume: what is shared out; what exceeds the caps' sum is left.
        floors: the least each is given, at most its cap and together at most the volume; 0 where None.

    Returns:
        As many numbers as there are scores, their sum exactly the volume or the caps' sum, whichever is less.
    """
    low = floors or [0] * len(caps)
    room = [cap - least for cap, least in zip(caps, low, strict=True)]
    weights = [Fraction(s) if math.isfinite(s) and s > 0 else Fraction(0) for s in scores]
    if not any(weights):
        weights = [Fraction(cap) for cap in caps]
    left = min(max(0, volume - sum(low)), sum(room))
    given = _filled(weights, room, left)
    if sum(given) < left:
        # The members without a score take what nobody else has room for.
        rest = [Fraction(0) if w else Fraction(r) for w, r in zip(weights, room, strict=True)]
        given = [a + b for a, b in zip(given, _filled(rest, room, left - sum(given)), strict=True)]
    return tuple(a + b for a, b in zip(given, low, strict=True))


def _filled(weights: Sequence[Fraction], room: Sequence[int], volume: int) -> list[int]:
    """Water-filling of members of positive weight up to their room."""
    active = [i for i, w in enumerate(weights) if w and room[i]]
    # Members fill up in this order as the level rises.
    active.sort(key=lambda i: room[i] / weights[i])
    given, left, weight = [0] * len(room), volume, sum((weights[i] for i in active), Fraction(0))
    while active and room[active[0]] * weight <= left * weights[active[0]]:
        full = active.pop(0)
        given[full], left, weight = room[full], left - room[full], weight - weights[full]
    if not active:
        return given
    remainders = {}
    for i in active:
        exact = left * weights[i] / weight
        given[i] = math.floor(exact)
        remainders[i] = exact - given[i]
    missing = left - sum(given[i] for i in active)
    for i in sorted(active, key=lambda i: (-remainders[i], -weights[i], -room[i], i))[:missing]:
        given[i] += 1
    return given


def proportional(share: float, caps: Sequence[int], volume: int) -> list[int]:
    """What members are sure of: `share` of the volume, by cap, rounded down."""
    total = sum(caps)
    part = Fraction(str(share))
    return [min(cap, math.floor(part * volume * cap / total)) for cap in caps]


class Clock:
    """When a competition is held: never before `warmup`, every so many steps, for the last time as `cooldown` begins.

    Args:
        total: steps of the whole schedule.
        warmup: share of the steps before the first competition.
        cooldown: share of the steps after the last one, which takes place before the last step in any case.
        every: steps from one to the next.
    """

    def __init__(self, total: int, warmup: float, cooldown: float, every: int) -> None:
        self.last = max(0, min(total - 1, total - math.ceil(Fraction(str(cooldown)) * total)))
        self.first = min(math.floor(Fraction(str(warmup)) * total), self.last)
        self.every = every

    def due(self, step: int) -> bool:
        """Whether the shares change before this step."""
        return step == self.last or (self.first < step < self.last and (step - self.first) % self.every == 0)


def check_clock(method: str, warmup: float, cooldown: float, every: int) -> None:
    """Refuse fields that make no schedule.

    Raises:
        UsageError: naming the field and the value.
    """
    for name, value in (("warmup", warmup), ("cooldown", cooldown)):
        if not 0 <= value < 1:
            raise UsageError(f"{method}: {name} is a share of the training, from 0 to below 1, got {value!r}")
    if warmup + cooldown > 1:
        raise UsageError(f"{method}: warmup and cooldown together are at most 1, got {warmup!r} and {cooldown!r}")
    if every < 1:
        raise UsageError(f"{method}: every is a number of steps of at least 1, got {every!r}")


class Importance(nn.Module):
    """How much a parameter matters, entry by entry: smoothed sensitivity times its smoothed uncertainty.

    With `I = |p dL/dp|`, after each backward pass `mean <- b1 mean + (1 - b1) I` and then
    `spread <- b2 spread + (1 - b2) |I - mean|`, both from 0 (AdaLoRA, arXiv 2303.10512, equations 8 and 9). Unlike the
    released code of SNELLA it takes the parameter at which the gradient was taken, not the one after the step. The
    gradient is read as soon as it is complete, so that what is known lies in the buffers whenever training is saved.
    A deep copy keeps the buffers and no longer follows the original's gradients.

    Args:
        parameter: what is watched; not held.
        beta_mean: b1.
        beta_spread: b2.
    """

    mean: Tensor
    spread: Tensor

    def __init__(self, parameter: nn.Parameter, beta_mean: float, beta_spread: float) -> None:
        super().__init__()
        self.betas = beta_mean, beta_spread
        self.register_buffer("mean", torch.zeros_like(parameter, requires_grad=False))
        self.register_buffer("spread", torch.zeros_like(parameter, requires_grad=False))
        me = weakref.ref(self)

        def note(p: Tensor) -> None:
            watching = me()
            if watching is not None and p.grad is not None:
                watching.note(p, p.grad)

        parameter.register_post_accumulate_grad_hook(note)  # type: ignore[no-untyped-call]  # torch gives no types

    @torch.no_grad()
    def note(self, parameter: Tensor, gradient: Tensor) -> None:
        """Take in one gradient; entries that are no finite numbers count as 0."""
        first, second = self.betas
        sensitivity = (parameter * gradient).abs_().nan_to_num_(0.0, 0.0, 0.0)
        self.mean.lerp_(sensitivity, 1 - first)
        self.spread.lerp_(sensitivity.sub_(self.mean).abs_(), 1 - second)

    def score(self) -> Tensor:
        """`mean * spread`, of the parameter's shape, float64."""
        return self.mean.double() * self.spread.double()


class Competing(Shared):
    """The part of a group whose members compete.

    Every persistent buffer moves. What training alone needs lies in the submodule `watch`, and is neither exported nor
    counted as stored; checkpoints hold it.

    Attributes:
        start: the budget that the members share at the start, in `unit`.
        end: the same at the end; reached exactly.
        unit: what is shared.
        watch: buffers of training alone.
    """

    start: int
    end: int
    unit: str

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.watch = nn.ModuleDict()
        self._moving: frozenset[str] | None = None

    def shares(self) -> dict[str, int]:
        """Name of each member to what it holds now, in `unit`."""
        raise NotImplementedError(f"{type(self).__name__} does not say what its members hold")

    @property
    def spent(self) -> int:
        """What the members hold together now."""
        return sum(self.shares().values())

    @property
    def moving(self) -> frozenset[str]:  # type: ignore[override]  # depends on the members
        """Every persistent buffer."""
        if self._moving is None:
            self._moving = frozenset(self.state_dict()) - {name for name, _ in self.named_parameters()}
        return self._moving

    def stored(self) -> dict[str, Tensor]:
        """The state dict without `watch`."""
        return {name: t for name, t in self.state_dict().items() if not name.startswith("watch.")}

    def load_stored(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up what `stored` gave.

        Raises:
            UsageError: for a missing, unknown or misshapen tensor.
        """
        mine = self.stored()
        wrong = sorted(set(mine) ^ set(tensors)) or [n for n, t in mine.items() if t.shape != tensors[n].shape]
        if wrong:
            raise UsageError(
                f"{type(self).__name__} on {self.site.name} does not fit the file at {', '.join(wrong[:5])}"
                f"{' and others' if len(wrong) > 5 else ''}; load it with its own plan"
            )
        with torch.no_grad():
            for name, tensor in self.state_dict().items():
                if name in mine:
                    tensor.copy_(tensors[name])
