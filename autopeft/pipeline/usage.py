"""What a training step costs besides parameters: FLOPs, and bytes kept for the backward pass.

A model of two parts. The frozen base is watched in one step with gradients from its first site on: what every stretch
between two sites keeps and computes. Of each option the adapter is run on its host alone: what it adds, and what it
adds besides where a gradient goes on to its host's input. A plan then costs what its options add, each host's input
once, and everything of the base behind its first option, since gradients must travel there.

Sites are ordered by when they run. Where branches run side by side (the shortcut of a residual network's wider block) a
plan that trains in one of them alone is charged for the others too: never too little.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from autopeft.core.cap import Cap, Term
from autopeft.core.contracts import Method
from autopeft.core.menu import Menu, Option
from autopeft.core.site import Catalog, Site
from autopeft.pipeline._step_base import WATCHED, Base, watch
from autopeft.pipeline._step_probe import Added, Amount, probe
from autopeft.pipeline.built import alike

__all__ = ["step_usage"]

_DEVIATION = 0.01
"""Relative error at one size from which on every size is looked at."""

_Extra = dict[tuple[str, str, int], tuple[tuple[int, float], ...]]
"""See `Cap.extra`."""


def step_usage(
    model: nn.Module,
    catalog: Catalog,
    methods: Mapping[str, Method],
    menu: Menu,
    loss: Callable[[int], Tensor],
    batch: int,
) -> tuple[Cap, Cap]:
    """The FLOPs of a training step, and the bytes that it keeps for its backward pass, without limits.

    FLOPs are those that torch's counter knows: matrix products, convolutions and attention, forward and backward. Bytes
    are those of the tensors that autograd saves, parameters and buffers not counted, each storage once.

    Args:
        model: the model as it is trained, its head trainable and everything else frozen; left as found.
        catalog: its sites.
        methods: method key to method.
        menu: the options.
        loss: number of samples to the loss of as many, computed by the model.
        batch: samples of a step.

    Returns:
        The caps of FLOPs and of bytes.
    """
    base = watch(model, catalog, loss)
    scale = batch / WATCHED
    flop_terms = [Term(max(amount, 0.0) * scale, i - 1) for i, amount in enumerate(base.flops)]
    amounts = [max(amount, 0.0) * scale for amount in base.kept]
    after = [i - 1 for i in range(len(amounts))]
    inputs: dict[int, int] = {}
    for storage, x in base.inputs.values():
        if storage in inputs:
            continue
        inputs[storage] = len(amounts)
        size, stretch = x.untyped_storage().nbytes() * scale, base.tags.get(storage, -1)
        if stretch >= 0:
            amounts[stretch] = max(amounts[stretch] - size, 0.0)
        amounts.append(size)
        after.append(stretch)
    alikes: dict[Any, list[Option]] = {}
    for o in menu:
        site = menu.sites[o.site]
        alikes.setdefault((alike(model, methods[o.method], site), *_surroundings(base, site)), []).append(o)
    flops: dict[tuple[str, str, int], float] = {}
    held: dict[tuple[str, str, int], float] = {}
    way: dict[tuple[str, str, int], tuple[int, ...]] = {}
    kept: dict[tuple[str, str, int], tuple[int, ...]] = {}
    passing: tuple[_Extra, _Extra] = ({}, {})
    insides: dict[str, int] = {}
    for members in alikes.values():
        by_size = {o.size: o for o in reversed(members)}

        def look(size: int, by_size: Mapping[int, Option] = by_size) -> Added:
            o = by_size[size]
            return probe(model, methods[o.method], menu.sites[o.site], o, base)

        known = _known(sorted(by_size), look)
        for o in members:
            ident, added = o.ident, _between(known, o.size)
            hosts = [m.module for m in (menu.sites[o.site].members or (menu.sites[o.site],))]
            begins = [base.start[h] if added.from_start else base.stage[h] for h in hosts if h in base.stage]
            flops[ident], held[ident] = added.flops.at(batch), added.kept.at(batch)
            way[ident] = (max(0, min(begins, default=0)),) if base.flops else ()
            reads = {inputs[base.inputs[h][0]] for h in hosts if h in base.inputs} if added.reads else set()
            for h, amount in added.inside.items():
                reads.add(_inside(hosts[h], amount.at(batch), base, amounts, after, insides))
            kept[ident] = (*way[ident], *sorted(reads))
            for found, amounts_of in zip(passing, (added.flops_on, added.kept_on), strict=True):
                pairs = [(base.start.get(hosts[h], -1), amount.at(batch)) for h, amount in amounts_of.items()]
                found[ident] = tuple((term, amount) for term, amount in pairs if term >= 0 and amount > 0)
    terms = tuple(Term(amount, i) for amount, i in zip(amounts, after, strict=True))
    samples, fixed = f"a training step of {batch} samples", base.fixed[1] * scale
    return (
        Cap(f"FLOPs of {samples}", math.inf, base.fixed[0] * scale, flops, tuple(flop_terms), way, passing[0]),
        Cap(f"bytes kept for the backward pass of {samples}", math.inf, fixed, held, terms, kept, passing[1]),
    )


def _inside(host: str, size: float, base: Base, amounts: list[float], after: list[int], known: dict[str, int]) -> int:
    """The term of what a host keeps between its input and its output, taken out of the stretch that it lies in."""
    if host not in known:
        known[host] = len(amounts)
        stretch = base.start.get(host, -1)
        if stretch >= 0:
            amounts[stretch] = max(amounts[stretch] - size, 0.0)
        amounts.append(size)
        after.append(stretch)
    return known[host]


def _surroundings(base: Base, site: Site) -> Iterator[tuple[Any, ...]]:
    """What enters the hosts of a site, whether a gradient could leave by it, and whether its output is kept behind."""
    for member in site.members or (site,):
        name = member.module
        known = name in base.inputs
        yield (tuple(base.inputs[name][1].shape), base.start[name] < 0, name in base.read) if known else ()


def _known(sizes: list[int], look: Callable[[int], Added]) -> dict[int, Added]:
    """What the smallest, a middle and the largest size add; every size, where these do not tell of a fourth one."""
    known = {size: look(size) for size in sorted({sizes[0], sizes[len(sizes) // 2], sizes[-1]})}
    left = [size for size in sizes if size not in known]
    if left:
        asked = left[len(left) // 2]
        told, is_so = _between(known, asked), look(asked)
        known[asked] = is_so
        pairs = zip(told.amounts(), is_so.amounts(), strict=True)
        if any(abs(t.at(1) - i.at(1)) > _DEVIATION * i.at(1) for t, i in pairs):
            known |= {size: look(size) for size in left if size != asked}
    return known


def _between(known: Mapping[int, Added], size: int) -> Added:
    """The polynomial of least degree through the known sizes: mostly, amounts are linear or quadratic in a size."""
    if size in known:
        return known[size]
    sizes = list(known)

    def through(values: list[float]) -> float:
        weights = [math.prod((size - other) / (at - other) for other in sizes if other != at) for at in sizes]
        return max(math.fsum(w * v for w, v in zip(weights, values, strict=True)), 0.0)

    def amount(rows: list[Amount]) -> Amount:
        return Amount(through([r.per_sample for r in rows]), through([r.once for r in rows]))

    rows = list(known.values())
    reads, from_start = any(r.reads for r in rows), any(r.from_start for r in rows)
    on = (
        {h: amount([r.flops_on[h] for r in rows]) for h in rows[0].flops_on},
        {h: amount([r.kept_on[h] for r in rows]) for h in rows[0].kept_on},
    )
    return Added(
        amount([r.flops for r in rows]), amount([r.kept for r in rows]), *on, rows[0].inside, reads, from_start
    )
