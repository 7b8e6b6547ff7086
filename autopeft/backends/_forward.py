"""A host's forward with its adapters in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from autopeft.core.site import Site
from autopeft.errors import UsageError
from autopeft.methods.base import Adapter

__all__ = ["EntryForward", "HostForward", "Switch", "merge_into", "parameter_names"]


@dataclass(slots=True)
class Switch:
    """Whether the adapters of a model act; all its hosts look at one."""

    on: bool = True


class EntryForward:
    """Replaces the forward of a norm in front of a residual branch: remembers what enters it.

    Args:
        base: the norm's own forward, bound.
        switch: whether the adapters act; nothing is remembered while they do not.
    """

    def __init__(self, base: Callable[..., Any], switch: Switch) -> None:
        self.base = base
        self.switch = switch
        self.seen: Tensor | None = None

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.switch.on:
            self.seen = x
        return self.base(x, *args, **kwargs)

    def take(self, site: Site) -> Tensor:
        """The last input, once: kept longer it would keep its graph alive."""
        seen, self.seen = self.seen, None
        if seen is None:
            raise UsageError(
                f"{site.entry} was not called before {site.name}; an adapter that reads the residual stream in front "
                f"of it cannot run there"
            )
        return seen


class HostForward:
    """Replaces `host.forward`: base forward on changed tensors and input, plus branches, then output maps.

    Adapters of all forms compose in this order whatever order they were given in: first the host's tensors are
    swapped and what stands in for it takes its place, then its input is mapped, then branches of the original input
    are added, then outputs are mapped; merging keeps the same order. Adapters that wrap go around all of it, the first
    one outermost.

    Args:
        host: the module.
        base: its own forward, bound.
        adapters: the adapters on it.
        switch: whether they act.
        entries: dotted path of a norm to what remembers its input, for adapters that read it.
    """

    def __init__(
        self,
        host: nn.Module,
        base: Callable[..., Any],
        adapters: Sequence[Adapter],
        switch: Switch | None = None,
        entries: Mapping[str, EntryForward] | None = None,
    ) -> None:
        self.host = host
        self.base = base
        self.switch = switch or Switch()
        self.entries = entries or {}
        self.swaps = [a for a in adapters if a.form == "swap"]
        self.stand_ins = [a for a in adapters if a.form == "stand_in"]
        if len(self.stand_ins) > 1:
            raise UsageError(
                f"two adapters would run in the place of {self.stand_ins[0].site.name}, and only one can: it must "
                f"claim the site's weight"
            )
        self.inputs = [a for a in adapters if a.form == "input"]
        self.branches = [a for a in adapters if a.form == "branch"]
        self.outputs = [a for a in adapters if a.form == "output"]
        self.wraps = [a for a in adapters if a.form == "wrap"]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.switch.on:
            return self.base(*args, **kwargs)
        run: Callable[..., Any] = partial(self._run, **kwargs) if kwargs else self._run
        for adapter in reversed(self.wraps):
            run = partial(adapter.around, run)
        return run(*args)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        given = args
        if self.inputs:
            if not args:
                raise UsageError(
                    f"{self.inputs[0].site.name} is called with keywords alone; its input cannot be mapped"
                )
            x = args[0]
            for adapter in self.inputs:
                x = adapter.receive(x)
            given = (x, *args[1:])
        base: Callable[..., Any] = partial(self.base, **kwargs) if kwargs else self.base
        for adapter in reversed(self.stand_ins):
            base = partial(adapter.around, base)
        with self._swapped():
            y = base(*given)
        if not self.branches and not self.outputs:
            return y
        if not isinstance(y, Tensor):
            names = ", ".join(a.site.name for a in (*self.branches, *self.outputs))
            raise UsageError(
                f"{type(self.host).__name__} returns a {type(y).__name__} and not a tensor; "
                f"no output adapter can act on {names}"
            )
        if self.branches:
            x = args[0] if args else next(iter(kwargs.values()))
            for adapter in self.branches:
                seen = self.entries[adapter.site.entry].take(adapter.site) if adapter.reads_entry else x
                y = _on_rows(adapter.site, y, partial(_add_branch, adapter, seen))
        for adapter in self.outputs:
            y = _on_rows(adapter.site, y, adapter.transform)
        return y

    @contextmanager
    def _swapped(self) -> Iterator[None]:
        if not self.swaps:
            yield
            return
        held = self.host._parameters
        names = sorted({name for a in self.swaps for name in parameter_names(a).values()})
        before = {name: held[name] for name in names}
        tensors: dict[str, Tensor] = {name: p for name, p in before.items() if p is not None}
        for adapter in self.swaps:
            merge_into(adapter, tensors)
        try:
            # The module reads its tensors by attribute, which looks here first; a Parameter is not required.
            held.update(tensors)  # type: ignore[arg-type]
            yield
        finally:
            held.update(before)


def parameter_names(adapter: Adapter) -> dict[str, str]:
    """Which of the host's parameters each slot that `merge` works on means."""
    site = adapter.site
    if site.kind in ("block", "residual"):
        return {}
    if site.kind == "tokens":
        return {"tokens": site.parameter}
    names = {"weight": site.parameter}
    if site.has_bias:
        names["bias"] = "bias"
    return names


def merge_into(adapter: Adapter, tensors: dict[str, Tensor]) -> None:
    """Replace the host's tensors by those with the adapter in them, on the site's rows.

    Args:
        adapter: the adapter.
        tensors: parameter name to tensor of the host; changed in place, tensors that are not touched stay the same
            objects.
    """
    names = parameter_names(adapter)
    rows = adapter.site.rows
    given: Mapping[str, Tensor] = {
        slot: tensors[name] if rows is None else tensors[name][rows[0] : rows[1]] for slot, name in names.items()
    }
    for slot, merged in adapter.merge(given).items():
        if merged is given[slot]:
            continue
        name = names[slot]
        tensors[name] = (
            merged if rows is None else torch.slice_scatter(tensors[name], merged, dim=0, start=rows[0], end=rows[1])
        )


def _add_branch(adapter: Adapter, x: Tensor, rows: Tensor) -> Tensor:
    """The host's dtype decides: under autocast a branch must not widen what the next layer sees."""
    return rows + adapter.branch(x).to(rows.dtype)


def _on_rows(site: Site, y: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Change the site's rows of the host's output."""
    if site.rows is None:
        return change(y)
    start, stop = site.rows
    rows = y.narrow(site.channel_axis, start, stop - start)
    return torch.slice_scatter(y, change(rows), dim=site.channel_axis, start=start, end=stop)
