"""Gains of any method, from its own parametrisation: what its tangent at the start captures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from autopeft.allocation._stand_in import stand_in
from autopeft.core.menu import Option
from autopeft.core.site import Place, Site, Slot
from autopeft.errors import UsageError
from autopeft.methods.base import Adapter, Shared

if TYPE_CHECKING:
    from autopeft.core.contracts import Method
    from autopeft.core.scores import Evidence

__all__ = ["tangent_gains"]

_ROUNDS = 40
_CLOSE = 1e-6
"""Residual of the normal equations, relative to the first one, at which to stop."""

_STEP = 1e-4
"""Central differences in float64: a step of this share of the parameters' norm."""

_SMALL = 1e-3
"""Size of the outputs that a bottleneck is shown: small enough to be linear, large enough to be exact."""


def tangent_gains(
    method: Method, site: Site, evidence: Evidence, sizes: Sequence[int], seed: int = 0
) -> tuple[float, ...] | None:
    """Energy of the signal in the space that a step of the method's parameters can move in, for each size.

    With `f(theta)` the change of the site's tensors as a function of the method's own parameters, J its Jacobian at
    the start and s the signal, the gain is `max_d 2 s^T J d - |J d|^2 = |P s|^2`, P the projection on the range of J.
    The method is built in float64 on a stand-in host with the pre-trained values. Tensors that start at zero (the dual
    factor of a product) are drawn at random in the size of the others first: at zero, their partners would have no
    gradient and be valued as nothing. The projection is found by conjugate gradients with `J^T u` by autograd and `J d`
    by central differences, so that nothing but one differentiation is asked of a method. A size whose space is drawn
    blindly captures what it happens to, as it would in training.

    Adapters on an output are shown small multiples of the unit vectors and of zero, which makes f the matrix and the
    shift they act by.

    Args:
        method: the method.
        site: where; a group too.
        evidence: what is known about the site.
        sizes: which sizes.
        seed: of the start.

    Returns:
        The gains, or None where the method cannot be built on a lone host or acts in a way that is neither a change of
        tensors nor a map of the output: its own formula must do.

    Raises:
        UsageError: when the scorer kept nothing for a slot that the method changes.
    """
    found = []
    for size in sizes:
        gain = _captured(method, site, evidence, size, seed)
        if gain is None:
            return None
        found.append(gain)
    return tuple(found)


def _captured(method: Method, site: Site, evidence: Evidence, size: int, seed: int) -> float | None:
    host = stand_in(site, evidence)
    slots = method.slots(site)
    if host is None or not slots:
        return None
    indices = method.select(site, evidence, size)
    places = tuple(sorted(Place(site.name, slot) for slot in slots))
    option = Option(site.name, "tangent", size, method.cost(site, size), 0.0, places, indices)
    part = method.build(site, option, host, torch.Generator().manual_seed(seed))
    if not isinstance(part, Adapter | Shared):
        return None
    adapters = (part,) if isinstance(part, Adapter) else part.adapters()
    if not all(a.mergeable or a.form == "output" for a in adapters):
        return None
    parameters = [p for p in part.parameters() if p.requires_grad]
    _wake(parameters, torch.Generator().manual_seed(seed + 1))
    targets = [target for a in adapters for target in _targets(a, evidence)]
    if not parameters or not targets:
        return None
    signal = torch.cat([t.flatten() for _, t in targets])

    def change() -> Tensor:
        return torch.cat([make().flatten() for make, _ in targets])

    return _projected(parameters, change, signal)


def _wake(parameters: Sequence[nn.Parameter], generator: torch.Generator) -> None:
    """Give tensors that are zero a random value of the size of the others."""
    live = [p for p in parameters if bool(p.any())]
    square = sum(float(p.detach().double().square().sum()) for p in live)
    size = math.sqrt(square / sum(p.numel() for p in live)) if live else 1.0
    with torch.no_grad():
        for p in parameters:
            if not bool(p.any()):
                p.copy_(size * torch.randn(p.shape, generator=generator, dtype=torch.float64))


def _targets(adapter: Adapter, evidence: Evidence) -> Iterator[tuple[Callable[[], Tensor], Tensor]]:
    """What the adapter makes of each thing it changes, and the signal of that thing."""
    site = adapter.site
    known = evidence if evidence.site.name == site.name else evidence.members[site.name]
    if not adapter.mergeable:
        matrix, shift = _output_signals(site, known)
        yield lambda: _response(adapter), matrix.T
        if shift is not None:
            yield lambda: _shown(adapter, torch.zeros(1, site.out_features, dtype=torch.float64)), shift
        return
    kept: list[Slot] = [slot for slot in ("weight", "bias", "tokens") if slot in known.slots]
    missing = [slot for slot in adapter.slots if slot != "output" and slot not in kept]
    if missing:
        raise UsageError(f"the scorer kept nothing for slot {missing[0]!r} of {site.name}")
    values: dict[str, Tensor] = {slot: known[slot].value.detach().cpu().double() for slot in kept}
    # A change of the output that merges is one of weight and bias.
    for slot in kept if "output" in adapter.slots else adapter.slots:

        def made(slot: str = slot) -> Tensor:
            return adapter.merge(values)[slot] - values[slot]

        yield made, known[slot].signal.detach().cpu().double()


def _output_signals(site: Site, known: Evidence) -> tuple[Tensor, Tensor | None]:
    """Signals of a matrix, and of a shift, behind the output; `G W^T + g_b b^T` for a layer."""
    output = known.get("output")
    if output is not None:
        return output.signal.detach().cpu().double(), None
    weight, bias = known["weight"], known.get("bias")
    g, w = (t.detach().cpu().double().reshape(site.out_features, -1) for t in (weight.signal, weight.value))
    matrix = g @ w.T
    if bias is None:
        return matrix, None
    shift = bias.signal.detach().cpu().double()
    return matrix + torch.outer(shift, bias.value.detach().cpu().double()), shift


def _shown(adapter: Adapter, rows: Tensor) -> Tensor:
    """The change of some output vectors, (n, channels)."""
    y = rows[:, :, None, None] if adapter.site.channel_axis == 1 else rows
    return (adapter.transform(y) - y).reshape(rows.shape)


def _response(adapter: Adapter) -> Tensor:
    """The linear map of an output that the adapter adds, one unit vector per row: its transpose."""
    unit = _SMALL * torch.eye(adapter.site.out_features, dtype=torch.float64)
    return (_shown(adapter, unit) - _shown(adapter, -unit)) / (2 * _SMALL)


def _projected(parameters: Sequence[nn.Parameter], change: Callable[[], Tensor], signal: Tensor) -> float:
    """Conjugate gradients on `J^T J d = J^T s`; at every iterate the captured energy is `s^T J d`."""
    start = [p.detach().clone() for p in parameters]
    norm = math.sqrt(sum(float(p.square().sum()) for p in start)) or 1.0

    def back(direction: Tensor) -> Tensor:
        found = torch.autograd.grad(change(), parameters, direction, allow_unused=True)
        pairs = zip(found, parameters, strict=True)
        return torch.cat([(torch.zeros_like(p) if g is None else g).flatten().double() for g, p in pairs])

    def ahead(direction: Tensor) -> Tensor:
        step = _STEP * norm / float(direction.norm())
        pieces = torch.split(direction, [p.numel() for p in parameters])
        ends = []
        with torch.no_grad():
            for sign in (1, -1):
                for p, s, piece in zip(parameters, start, pieces, strict=True):
                    p.copy_(s + sign * step * piece.view(p.shape))
                ends.append(change().detach())
            for p, s in zip(parameters, start, strict=True):
                p.copy_(s)
        return (ends[0] - ends[1]) / (2 * step)

    slope = back(signal)
    residual, total = slope.clone(), float(slope.square().sum())
    if not total > 0:
        return 0.0
    direction, rest, captured = residual.clone(), total, 0.0
    for _ in range(min(_ROUNDS, len(slope))):
        moved = ahead(direction)
        bend = float(moved.square().sum())
        if not bend > 0:
            break
        length = rest / bend
        captured += length * float(slope @ direction)
        residual -= length * back(moved)
        after = float(residual.square().sum())
        if after <= _CLOSE**2 * total:
            break
        direction = residual + (after / rest) * direction
        rest = after
    if not math.isfinite(captured):
        raise UsageError("a method's change is not finite near its start; value it by its own formula")
    return min(captured, float(signal.square().sum()))
