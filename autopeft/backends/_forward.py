"""A host's forward with its adapters in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from autopeft.core.site import Site
from autopeft.errors import UsageError
from autopeft.methods.base import Adapter

__all__ = ["HostForward", "merge_into", "parameter_names"]


class HostForward:
    """Replaces `host.forward`: base forward on changed tensors, plus branches, then output maps.

    Adapters of all forms compose in this order whatever order they were given in: first the host's tensors are
    swapped, then branches are added, then outputs are mapped; merging keeps the same order.

    Args:
        host: the module.
        base: its own forward, bound.
        adapters: the adapters on it.
    """

    def __init__(self, host: nn.Module, base: Callable[..., Any], adapters: Sequence[Adapter]) -> None:
        self.host = host
        self.base = base
        self.swaps = [a for a in adapters if a.form == "swap"]
        self.branches = [a for a in adapters if a.form == "branch"]
        self.outputs = [a for a in adapters if a.form == "output"]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._swapped():
            y = self.base(*args, **kwargs)
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
                y = _on_rows(adapter.site, y, partial(_add_branch, adapter, x))
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
    if site.kind == "block":
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
