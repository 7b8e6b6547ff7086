"""What an adapter adds to a training step, found by running it on its host alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from autopeft.backends._forward import EntryForward, HostForward, Switch
from autopeft.core.contracts import Method
from autopeft.core.menu import Option
from autopeft.core.site import Site
from autopeft.methods.base import Adapter, Shared
from autopeft.pipeline._step_base import Base, Kept
from autopeft.pipeline.built import built

__all__ = ["Added", "Amount", "probe"]

_IN_FRONT = ("wrap", "input")
"""Forms whose gradients begin in front of the host rather than behind it."""


@dataclass(frozen=True, slots=True)
class Amount:
    """What an option adds: per sample, and once per step."""

    per_sample: float = 0.0
    once: float = 0.0

    @classmethod
    def of(cls, two: float, three: float) -> Amount:
        """From what steps of two and of three samples add: what is a view for one sample may be a copy for more."""
        per_sample = max(three - two, 0.0)
        return cls(per_sample, max(two - 2 * per_sample, 0.0))

    def __add__(self, other: Amount) -> Amount:
        return Amount(self.per_sample + other.per_sample, self.once + other.once)

    def at(self, batch: int) -> float:
        return self.per_sample * batch + self.once


@dataclass(frozen=True, slots=True)
class Added:
    """What one option adds to a step.

    Attributes:
        flops: floating-point operations, forward and backward.
        kept: bytes, the host's input not counted.
        flops_on: position of a host to further operations where a gradient goes on to the host's input.
        kept_on: the same of bytes.
        inside: position of a host to what the host itself keeps for the option, and for gradients that pass it, once.
        reads: whether it keeps its host's input.
        from_start: whether gradients begin in front of its host rather than behind it.
    """

    flops: Amount
    kept: Amount
    flops_on: Mapping[int, Amount]
    kept_on: Mapping[int, Amount]
    inside: Mapping[int, Amount]
    reads: bool
    from_start: bool

    def amounts(self) -> list[Amount]:
        """All of them, in an order that options of one method at one site share."""
        return [self.flops, self.kept, *self.flops_on.values(), *self.kept_on.values()]


def probe(model: nn.Module, method: Method, site: Site, option: Option, base: Base) -> Added:
    """Runs what an option builds on its hosts alone, for two and for three samples."""
    part = built(model, method, site, option)
    part.requires_grad_(True)
    adapters = part.adapters() if isinstance(part, Shared) else [part] if isinstance(part, Adapter) else []
    hosts = [m.module for m in (site.members or (site,))]
    flops, kept, reads, from_start = Amount(), Amount(), False, False
    flops_on, kept_on = dict.fromkeys(range(len(hosts)), Amount()), dict.fromkeys(range(len(hosts)), Amount())
    inside: dict[int, Amount] = {}
    for adapter in adapters:
        name = adapter.site.module
        if name not in base.inputs or adapter.site.kind == "tokens":
            # Tokens of the model itself: the sum with a trained tensor keeps nothing and multiplies nothing.
            continue
        x = base.inputs[name][1].detach()
        runs = (x[:1].expand(n, *x.shape[1:]).clone() for n in (2, 3))
        two, three = (_difference(model, adapter, batch, base) for batch in runs)
        flops = flops + Amount.of(two.flops, three.flops)
        kept = kept + Amount.of(two.kept, three.kept)
        h = hosts.index(name)
        flops_on[h] = flops_on[h] + Amount.of(two.flops_on, three.flops_on)
        kept_on[h] = kept_on[h] + Amount.of(two.kept_on, three.kept_on)
        if two.inside:
            inside[h] = Amount.of(two.inside, three.inside)
        reads, from_start = reads or two.reads, from_start or adapter.form in _IN_FRONT
    return Added(flops, kept, flops_on, kept_on, inside, reads, from_start)


@dataclass(frozen=True, slots=True)
class _Run:
    """One step of a host: operations, bytes by storage, storages of its input and output."""

    flops: float
    bytes: Mapping[int, int]
    x: int
    y: int

    def kept(self, y: bool) -> float:
        """Bytes without the input, and with or without the output."""
        return float(
            sum(size for storage, size in self.bytes.items() if storage != self.x and (y or storage != self.y))
        )


@dataclass(frozen=True, slots=True)
class _Change:
    """What an adapter adds to its host, always and where a gradient goes on to the host's input; see `Added`."""

    flops: float
    kept: float
    flops_on: float
    kept_on: float
    reads: bool
    inside: float = 0.0


def _difference(model: nn.Module, adapter: Adapter, x: Tensor, base: Base) -> _Change:
    """What the adapter adds to its host, given the host's input."""
    name = adapter.site.module
    host, read = model.get_submodule(name), name in base.read

    def plain(grad: bool) -> _Run:
        key = (name, len(x), grad)
        if key not in base.runs:
            base.runs[key] = _run(host, None, x, grad, read)
        found: _Run = base.runs[key]
        return found

    alone, idle = _run(host, adapter, x, False, read), plain(False)
    # What is read behind is counted there, as the output of the plain host.
    flops, kept, reads = max(alone.flops - idle.flops, 0.0), alone.kept(not read), alone.x in alone.bytes
    if base.start[name] < 0:
        # No gradient ever reaches the host's input.
        return _Change(flops, kept, 0.0, 0.0, reads)
    mine, bare = _run(host, adapter, x, True, read), plain(True)
    both = mine.flops - bare.flops, mine.kept(True) - bare.kept(True)
    if adapter.form in _IN_FRONT:
        # Gradients begin in front of the host, whose own share is counted with the stretch there.
        return _Change(max(both[0], 0.0), max(both[1], 0.0), 0.0, 0.0, False)
    reads = mine.x in mine.bytes and (reads or bare.x not in bare.bytes)
    # Less where a gradient goes on: then the host keeps for it what it keeps for the adapter otherwise.
    inside = bare.kept(False) if both[1] < kept else 0.0
    return _Change(
        flops,
        min(kept, max(both[1], 0.0)) if inside else kept,
        max(both[0] - flops, 0.0),
        max(both[1] - kept, 0.0),
        reads,
        inside,
    )


def _run(host: nn.Module, adapter: Adapter | None, x: Tensor, grad: bool, read: bool) -> _Run:
    """One forward and backward pass of a host, with an adapter or without one; its output is kept where it is read."""
    entries = {}
    if adapter is not None and adapter.reads_entry:
        entries[adapter.site.entry] = EntryForward(lambda y: y, Switch())
    forward = HostForward(host, host.forward, [] if adapter is None else [adapter], entries=entries)

    def call(x: Tensor) -> Tensor:
        for entry in entries.values():
            entry(x)
        y: Tensor = forward(x)
        return y

    parts = [host] if adapter is None else [host, adapter]
    tensors = [t for part in parts for t in (*part.parameters(), *part.buffers())]
    with FlopCounterMode(display=False) as counter:
        y = call(x.clone().requires_grad_(grad))
        if y.requires_grad:
            y.sum().backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    for tensor in tensors:
        tensor.grad = None
    x = x.clone().requires_grad_(grad)
    with Kept(tensors) as kept:
        y = call(x)
    held = dict(kept.bytes)
    out = y.untyped_storage()
    if read and y.requires_grad:
        held[out._cdata] = out.nbytes()
    return _Run(float(counter.get_total_flops()), held, x.untyped_storage()._cdata, out._cdata)
