"""Every option of a model at once, each behind a gate: what searches by training choose from."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from autopeft.core.allocation import Allocation, Provenance
from autopeft.core.budget import Budget, Cost
from autopeft.core.contracts import Inserted, Method
from autopeft.core.menu import Option
from autopeft.core.outcome import Split
from autopeft.core.site import Place, Site, Slot
from autopeft.errors import InfeasibleBudget
from autopeft.methods._traits import ChoosesNothing
from autopeft.methods.base import Adapter
from autopeft.pipeline.plan import make_menu
from autopeft.training.optim import schedule_factor
from autopeft.training.rates import rate_factor, sizes_of
from autopeft.training.seeds import derive_seed, isolated_rng, seed_all
from autopeft.training.threads import thread_count

if TYPE_CHECKING:
    from autopeft.config.study import Study
    from autopeft.core.scores import Evidence
    from autopeft.pipeline.prepare import Prepared

__all__ = ["Supernet", "greedy", "pool", "rate_at", "supernet"]

_KEY = "gated"


def pool(prepared: Prepared, study: Study, *, smallest: bool) -> tuple[Option, ...]:
    """The options of the study's menu that a search by training chooses from, with the entries of sparse ones.

    Sizes are not searched by the published methods: a method is offered at the largest size at which the budget pays
    for it on all of its sites together, or else at its smallest. Options on groups, on slices beside their whole, and
    those that cannot be merged are left out: gates act on merged tensors.

    Args:
        prepared: catalogue, budget and scores.
        study: methods.
        smallest: offer every method at its smallest size as well.
    """
    menu, unit = make_menu(prepared, study), prepared.budget.unit
    offered: dict[str, dict[str, list[Option]]] = {}
    for option in menu.options:
        site = menu.sites[option.site]
        if site.kind == "group" or (site.parent and site.parent in menu.sites):
            continue
        if study.methods[option.method].mergeable(site):
            offered.setdefault(option.method, {}).setdefault(option.site, []).append(option)
    chosen: list[Option] = []
    for by_site in offered.values():
        for options in by_site.values():
            options.sort(key=lambda o: o.size)
        every = sorted({o.size for options in by_site.values() for o in options})
        fitting = [k for k in every if sum(_at(o, k).cost.of(unit) for o in by_site.values()) <= prepared.budget.limit]
        for options in by_site.values():
            sizes = {_at(options, fitting[-1] if fitting else 0), *([options[0]] if smallest else [])}
            chosen += sorted(sizes, key=lambda o: o.size)
    if not chosen:
        raise InfeasibleBudget("no option of this menu can be merged, so there is nothing to put behind gates")
    return tuple(sorted((_with_entries(prepared, study, o) for o in chosen), key=lambda o: o.order))


def _at(options: Sequence[Option], size: int) -> Option:
    """The largest option up to a size, or the smallest of all."""
    return max((o for o in options if o.size <= size), key=lambda o: o.size, default=options[0])


def _with_entries(prepared: Prepared, study: Study, option: Option) -> Option:
    evidence = prepared.scores_for(study).evidence.get(option.site)
    if evidence is None:
        return option
    chosen = study.methods[option.method].select(prepared.catalog[option.site], evidence, option.size)
    return dataclasses.replace(option, indices=chosen)


def greedy(options: Sequence[Option], scores: Sequence[float], budget: Budget, name: str) -> Allocation:
    """The options in the order of their scores, each bought while it fits and its places are free; ties by order."""
    ranked = sorted(range(len(options)), key=lambda i: (-scores[i], options[i].order))
    taken: set[Place] = set()
    left, bought = budget.limit, []
    for i in ranked:
        option = options[i]
        cost = option.cost.of(budget.unit)
        if cost <= left and not taken & set(option.places):
            bought.append(option)
            taken |= set(option.places)
            left -= cost
    return Allocation(tuple(bought), budget, Provenance(name))


@dataclass(frozen=True, slots=True, eq=False)
class _Gated(ChoosesNothing):
    """A method that stands for all options of a site."""

    options: Mapping[str, tuple[Option, ...]]
    methods: Mapping[str, Method]

    family: ClassVar[str] = "matrix"

    def slots(self, site: Site) -> tuple[Slot, ...]:
        """Every slot that one of the options changes, and all that merging shows."""
        if site.name not in self.options:
            return ()
        claimed = {slot for o in self.options[site.name] for slot in self.methods[o.method].slots(site)}
        return tuple(slot for slot in site.slots if slot in claimed)

    def sizes(self, site: Site) -> tuple[int, ...]:
        """One."""
        return (1,) if self.slots(site) else ()

    def cost(self, site: Site, size: int) -> Cost:
        """All options together."""
        total = Cost.zero()
        for option in self.options[site.name]:
            total = total + option.cost
        return total

    def mergeable(self, site: Site) -> bool:
        """Yes, as every option is."""
        return True

    def build(self, site: Site, option: Option, host: nn.Module, generator: torch.Generator) -> _GatedAdapter:
        """Each option's adapter, in order."""
        parts = [self.methods[o.method].build(site, o, host, generator) for o in self.options[site.name]]
        return _GatedAdapter(site, self.slots(site), cast(list[Adapter], parts))

    def gains(self, site: Site, evidence: Evidence, sizes: Sequence[int]) -> tuple[float, ...]:
        """Not scored."""
        return (0.0,) * len(sizes)


class _GatedAdapter(Adapter):
    """`w + sum_i z_i (w_i - w)`, with w_i the site's tensors with option i merged into them."""

    def __init__(self, site: Site, slots: tuple[Slot, ...], parts: list[Adapter]) -> None:
        super().__init__(site, slots, "swap")
        self.parts = nn.ModuleList(parts)
        self.gates: Sequence[Tensor] = [torch.ones(())] * len(parts)

    def merge(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As the class says; an option whose gate is shut is not computed."""
        merged = dict(tensors)
        for gate, part in zip(self.gates, self.parts, strict=True):
            if not gate.requires_grad and float(gate) == 0.0:
                continue
            assert isinstance(part, Adapter)
            for slot, changed in part.merge(tensors).items():
                if changed is not tensors[slot]:
                    merged[slot] = merged[slot] + gate.to(changed) * (changed - tensors[slot])
        return merged


@dataclass(eq=False)
class Supernet:
    """All options in the model, for alternating steps on their weights and looks at other data.

    Attributes:
        options: the options; gates and scores are in their order.
        prepared: model, task and device.
        study: training settings.
        inserted: the model with everything in it.
        parts: adapter of each option.
        optimizer: AdamW over the options' weights and the head; its groups carry their `peak` rates.
        steps_per_epoch: steps of an epoch on the inner split.
        seen: samples that went forward and backward so far.
    """

    options: tuple[Option, ...]
    prepared: Prepared
    study: Study
    inserted: Inserted
    parts: list[Adapter]
    optimizer: torch.optim.AdamW
    steps_per_epoch: int
    seen: int = 0

    def set_gates(self, gates: Tensor) -> None:
        """Set the gates, shape (options,), with or without gradient."""
        values: dict[str, list[Tensor]] = {}
        for i, option in enumerate(self.options):
            values.setdefault(option.site, []).append(gates[i])
        for adapter in self.inserted.named_adapters().values():
            assert isinstance(adapter, _GatedAdapter)
            adapter.gates = values[adapter.site.name]

    def epoch(self, number: int, split: Split = "inner") -> Iterator[Any]:
        """The batches of one epoch, shuffled by the study's seed."""
        train = self.study.train
        batches = self.prepared.task.batches(split, derive_seed(self.study.seed, "supernet", split, number))
        steps = self.steps_per_epoch if split == "inner" and train.data_fraction < 1 else None
        return islice(iter(batches), steps)

    def step(self, batch: Any, factor: float) -> None:
        """One step of AdamW on the weights of all options and the head, at this factor of the peak rates."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        self.backward(batch)
        parameters = [p for g in self.optimizer.param_groups for p in g["params"] if p.grad is not None]
        if self.study.train.clip:
            nn.utils.clip_grad_norm_(parameters, self.study.train.clip)
        self.optimizer.step()

    def backward(self, batch: Any) -> Tensor:
        """Fresh gradients of the loss of a batch."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(batch)
        loss.backward()  # type: ignore[no-untyped-call]  # torch annotates it only in part
        return loss.detach()

    def loss(self, batch: Any) -> Tensor:
        """The loss of a batch at the gates set, counted as one pass."""
        self.seen += len(batch[0])
        return self.prepared.task.loss(self.inserted.model, batch)


@contextmanager
def supernet(prepared: Prepared, study: Study, options: Sequence[Option]) -> Iterator[Supernet]:
    """Borrow the model with all options in it, each behind an open gate; seeded, and left as it was."""
    by_site: dict[str, tuple[Option, ...]] = {}
    for option in options:
        by_site[option.site] = (*by_site.get(option.site, ()), option)
    gated = _Gated(by_site, study.methods)
    whole = []
    for name in by_site:
        site = prepared.catalog[name]
        places = tuple(sorted(prepared.catalog.places(site, gated.slots(site))))
        whole.append(Option(name, _KEY, 1, gated.cost(site, 1), 0.0, places))
    count = sum(o.cost.trainable for o in whole)
    plan = Allocation(tuple(whole), Budget(count, text="all options"))
    with (
        thread_count(prepared.threads),
        isolated_rng(derive_seed(study.seed, "supernet")),
        study.backend.insert(
            prepared.model, prepared.catalog, plan, {_KEY: gated}, seed=study.seed, head=prepared.head
        ) as inserted,
    ):
        seed_all(derive_seed(study.seed, "supernet"))
        inserted.train_mode(True)
        found = inserted.named_adapters()
        parts: list[Adapter] = []
        used: dict[str, int] = {}
        for option in options:
            adapter = found[f"{option.site}/{_KEY}"]
            assert isinstance(adapter, _GatedAdapter)
            part = adapter.parts[used.get(option.site, 0)]
            used[option.site] = used.get(option.site, 0) + 1
            assert isinstance(part, Adapter)
            parts.append(part)
        optimizer = _optimizer(study, inserted, options, parts, prepared.budget.limit)
        length = sum(1 for _ in prepared.task.batches("inner", 0))
        steps = max(1, round(study.train.data_fraction * length))
        try:
            yield Supernet(tuple(options), prepared, study, inserted, parts, optimizer, steps)
        finally:
            optimizer.zero_grad(set_to_none=True)
            inserted.train_mode(False)


@dataclass(frozen=True)
class _Listed:
    """Options in the model, as the rules of learning rates look at them."""

    options: tuple[Option, ...]
    adapters: Mapping[str, nn.Module]
    trainable: int

    @property
    def allocation(self) -> _Listed:
        """Itself."""
        return self

    def __iter__(self) -> Iterator[Option]:
        return iter(self.options)

    def named_adapters(self) -> Mapping[str, nn.Module]:
        """Option key to adapter."""
        return self.adapters


def _optimizer(
    study: Study, inserted: Inserted, options: Iterable[Option], parts: Sequence[Adapter], total: int
) -> torch.optim.AdamW:
    """The learning rates that each option would be trained with alone."""
    rates, rule = study.train.rates, study.train.rate_rule
    groups: list[dict[str, Any]] = []
    for option, part in zip(options, parts, strict=True):
        # One option at a time: the same method may be there in two sizes, under one key.
        sizes = sizes_of(cast(Inserted, _Listed((option,), {option.key: part}, total)), study.methods)
        peak = rates.of(study.methods[option.method].family)
        groups += [{"params": [p], "peak": peak * rate_factor(rule, sizes[id(p)])} for p in part.parameters()]
    groups.append({"params": list(inserted.groups()["head"]), "peak": rates.head})
    groups = [{**group, "lr": group["peak"]} for group in groups if group["params"]]
    return torch.optim.AdamW(groups, betas=study.train.betas, eps=study.train.eps, weight_decay=0.0)


def rate_at(study: Study, step: int, total: int) -> float:
    """Share of the peak rate at a step of a search."""
    return schedule_factor(step, total, study.train.warmup_fraction)
