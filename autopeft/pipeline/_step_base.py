"""What the frozen base keeps and computes in one training step, stretch by stretch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from autopeft.core.site import Catalog

__all__ = ["WATCHED", "Base", "Kept", "watch"]

WATCHED = 2
"""Samples of the watched steps."""


class Kept:
    """Inside of it, every storage that is saved for a backward pass is known, but for those of tensors given.

    Args:
        besides: tensors whose storages do not count: parameters and buffers.

    Attributes:
        bytes: storage to its bytes.
        tags: storage to the last value of `tag` while it was saved.
        tag: set from outside.
        last: storage to how many tensors had been saved when it was saved last.
        count: tensors saved so far.
    """

    def __init__(self, besides: Iterable[Tensor] = ()) -> None:
        self.bytes: dict[int, int] = {}
        self.tags: dict[int, int] = {}
        self.tag = -1
        self.last: dict[int, int] = {}
        self.count = 0
        self._held = [t.untyped_storage() for t in besides]
        self._left_out = {s._cdata for s in self._held}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._left_out:
            self._held.append(storage)
            self.bytes[storage._cdata] = storage.nbytes()
            self.tags[storage._cdata] = self.tag
            self.count += 1
            self.last[storage._cdata] = self.count
        return tensor

    def __enter__(self) -> Kept:
        self._hooks.__enter__()
        return self

    def __exit__(self, *args: object) -> None:
        self._hooks.__exit__(*args)


@dataclass(slots=True)
class Base:
    """What the frozen base does in one step on `WATCHED` samples.

    Attributes:
        stage: dotted path of a host to its position among the hosts, by when it finishes.
        start: the same by when it starts: the last host that has finished then, -1 for none.
        inputs: dotted path of a host to its first argument's storage, shape and bytes.
        kept: bytes kept behind each host until the next one has finished.
        flops: the same of floating-point operations.
        tags: storage to the stretch that keeps it.
        read: dotted paths of the hosts whose output something behind them keeps.
        runs: what has been found of hosts run alone, by path, number of samples and whether their input has a gradient.
    """

    stage: dict[str, int] = field(default_factory=dict)
    start: dict[str, int] = field(default_factory=dict)
    inputs: dict[str, tuple[int, Tensor]] = field(default_factory=dict)
    kept: list[float] = field(default_factory=list)
    flops: list[float] = field(default_factory=list)
    fixed: tuple[float, float] = (0.0, 0.0)
    tags: dict[int, int] = field(default_factory=dict)
    read: set[str] = field(default_factory=set)
    runs: dict[tuple[str, int, bool], Any] = field(default_factory=dict)


def watch(model: nn.Module, catalog: Catalog, loss: Callable[[int], Tensor]) -> Base:
    """One step of the head alone, and one with gradients from the first host on."""
    base = Base()
    tensors = [*model.parameters(), *model.buffers()]
    with FlopCounterMode(display=False) as counter, Kept(tensors) as kept:
        loss(WATCHED).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    base.fixed = float(counter.get_total_flops()), float(sum(kept.bytes.values()))
    forward_only = base.fixed[0]

    leaves = {
        s.module for s in catalog if s.module and s.kind not in ("block", "residual", "tokens", "group") and s.slots
    }
    wide = {s.module for s in catalog if s.module and s.kind in ("block", "residual")}
    names = {module: name for name, module in model.named_modules() if name in leaves | wide}
    reached: dict[int, float] = {}
    outputs: dict[str, tuple[Tensor, int]] = {}
    kept = Kept(tensors)
    counter = FlopCounterMode(display=False)
    hooks = []
    finished = 0

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        name = names[module]
        base.start.setdefault(name, finished - 1)
        if args and isinstance(args[0], Tensor):
            x = args[0]
            base.inputs.setdefault(name, (x.untyped_storage()._cdata, x))

    def after(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        nonlocal finished
        name = names[module]
        if name in base.stage or not isinstance(out, Tensor):
            return
        outputs[name] = (out, kept.count)
        if name in wide:
            base.stage[name] = max(finished - 1, 0)
            return
        stage = base.stage[name] = finished
        finished += 1
        kept.tag = stage
        if not out.requires_grad:
            out.requires_grad_()
        out.register_hook(  # type: ignore[no-untyped-call]  # torch leaves it untyped
            lambda grad: reached.setdefault(stage, float(counter.get_total_flops())) and None
        )

    for module in names:
        hooks += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    try:
        with counter, kept:
            value = loss(WATCHED)
            value.backward()  # type: ignore[no-untyped-call]  # as above
    finally:
        for hook in hooks:
            hook.remove()
        model.zero_grad(set_to_none=True)
    done = [reached.get(s, forward_only) for s in range(finished)]
    behind = [*done[1:], forward_only]
    base.flops = [d - b for d, b in zip(done, behind, strict=True)]
    base.kept = [0.0] * finished
    for storage, size in kept.bytes.items():
        if kept.tags[storage] >= 0:
            base.kept[kept.tags[storage]] += size
    if finished:
        base.kept[-1] -= base.fixed[1]
    base.tags = kept.tags
    base.read = {name for name, (out, n) in outputs.items() if kept.last.get(out.untyped_storage()._cdata, 0) > n}
    return base
