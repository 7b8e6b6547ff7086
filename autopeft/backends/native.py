"""The native backend: adapters as children of their hosts, whose forward is overridden while the model is borrowed."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from autopeft.backends._forward import EntryForward, HostForward, Switch
from autopeft.backends._inserted import CHILD, NativeInserted
from autopeft.backends._snapshot import Snapshot
from autopeft.core.allocation import Allocation
from autopeft.core.contracts import GroupMethod, Method
from autopeft.core.menu import Option
from autopeft.core.places import places_of
from autopeft.core.site import Catalog, Site, Slot
from autopeft.errors import BudgetMismatch, UsageError
from autopeft.methods.base import Adapter, Part, Shared

__all__ = ["Native"]

_MARK = "_autopeft_borrowed"
"""Attribute of a model that is borrowed."""

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
"""Modules whose children are their data: a further child would be run or counted."""


@dataclass(frozen=True, slots=True)
class Native:
    """Runs adapters inside the borrowed model without wrapping, copying or re-classing anything.

    Every host's `forward` is overridden on the instance by one that composes the host's adapters, and the adapters are
    its children, so that `.to`, `.parameters` and DistributedDataParallel see them. The head is trained in a copy.

    Adapters act when their host is called. Tokens of the model itself are swapped while the model is called, so
    `model(x)` sees them and a direct `model.forward_features(x)` does not.

    Attributes:
        train_batch_norm: let the BatchNorm statistics of the base follow the training data; they are then part of
            the saved state, and still given back as they were.
        base_dropout: keep the base's own dropout and stochastic depth on in training mode. Off by default: the
            frozen base is a feature extractor, and its noise hides small adapters.
    """

    train_batch_norm: bool = False
    base_dropout: bool = False

    yields: ClassVar[type[NativeInserted]] = NativeInserted
    """What `insert` yields."""

    @contextmanager
    def insert(
        self,
        model: nn.Module,
        catalog: Catalog,
        allocation: Allocation,
        methods: Mapping[str, Method],
        seed: int = 0,
        head: Mapping[str, Tensor] | None = None,
    ) -> Iterator[NativeInserted]:
        """Borrow the model; see `autopeft.core.contracts.Backend.insert`.

        Raises:
            UsageError: when the model is borrowed already, when the plan does not fit model, catalogue or methods, or
                when `head` does not fit the head.
            BudgetMismatch: when an adapter has another number of parameters than its option's cost says.
        """
        for name, module in model.named_modules():
            if _MARK in vars(module):
                raise UsageError(
                    f"{type(model).__name__}{f' ({name})' if name else ''} has adapters in it already; leave the first "
                    f"`with backend.insert(...)` before the second, or load the model twice"
                )
        snapshot = Snapshot(model)
        with ExitStack() as undo:
            undo.callback(snapshot.restore)
            setattr(model, _MARK, True)
            undo.callback(delattr, model, _MARK)
            snapshot.freeze()
            plan = _check_plan(model, catalog, allocation, methods)
            base = dict(model.named_modules())
            heads = _copy_heads(model, catalog, head, undo)
            in_head = [path for path in base if any(path == h or path.startswith(h + ".") for h in heads)]
            for path in in_head:
                del base[path]
            parts = {
                option.key: _build(site, option, methods[option.method], model.get_submodule(site.module), seed)
                for option, site in plan
            }
            switch = Switch()
            _attach(model, parts, switch, undo)
            inserted = self.yields(
                model,
                allocation,
                parts,
                heads,
                base,
                snapshot.parameters,
                self.train_batch_norm,
                self.base_dropout,
                switch,
            )
            if inserted.trainable_count() != allocation.trainable:
                raise BudgetMismatch(
                    f"the model has {inserted.trainable_count():,} new trainable parameters, "
                    f"the plan says {allocation.trainable:,}"
                )
            inserted.train_mode(False)
            try:
                yield inserted
            finally:
                inserted.open = False


def _check_plan(
    model: nn.Module, catalog: Catalog, allocation: Allocation, methods: Mapping[str, Method]
) -> list[tuple[Option, Site]]:
    """Every option with its site, once method, site and slots are known to exist."""
    plan = []
    modules = dict(model.named_modules())
    for option in allocation:
        if option.method not in methods:
            raise UsageError(
                f"option {option.key} needs method {option.method!r}, which was not given; "
                f"given: {', '.join(methods) or 'none'}"
            )
        if option.method == "head" or "/" in option.method:
            raise UsageError(f"a method cannot be called {option.method!r}; `head` and names with a slash are taken")
        site, method = catalog[option.site], methods[option.method]
        slots = method.slots(site)
        if site.kind == "group" and isinstance(method, GroupMethod):
            touched = method.parts(site) if slots else ()
        else:
            touched = ((site, slots),) if slots and site.kind != "group" else ()
        if not touched:
            raise UsageError(
                f"{option.method} cannot be used on {site.name} ({site.kind}); "
                f"slots that work there: {', '.join(site.slots) or 'none, its forward is never called'}"
            )
        for member, taken in touched:
            _check_site(model, modules, catalog, option, member, taken)
        places = places_of(catalog, method, site)
        if places != option.places:
            raise UsageError(
                f"option {option.key} claims {', '.join(map(str, option.places))}, but {option.method} occupies "
                f"{', '.join(str(p) for p in places)}"
            )
        plan.append((option, site))
    return plan


def _check_site(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    catalog: Catalog,
    option: Option,
    site: Site,
    slots: tuple[Slot, ...],
) -> None:
    if site.module not in modules:
        raise UsageError(
            f"{site.name} lies in module {site.module!r}, which {type(model).__name__} does not have; "
            f"the catalogue belongs to another model"
        )
    for path in catalog.head:
        if site.module == path or site.module.startswith(path + "."):
            raise UsageError(f"{site.name} lies in the head {path!r}, which is trained in full already")
    if not slots or not set(slots) <= set(site.slots):
        raise UsageError(
            f"{option.method} cannot be used on {site.name} ({site.kind}); "
            f"slots that work there: {', '.join(site.slots) or 'none, its forward is never called'}"
        )


def _build(site: Site, option: Option, method: Method, host: nn.Module, seed: int) -> Part:
    """What one option trains, drawn from the option's own random stream."""
    digest = hashlib.sha256(f"{seed}:{option.key}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    part = method.build(site, option, host, generator)
    if not isinstance(part, Shared if site.kind == "group" else Adapter):
        raise UsageError(
            f"{option.method} built a {type(part).__name__} for {site.name}; a method must build an "
            f"autopeft.methods.base.{'Shared for a group' if site.kind == 'group' else 'Adapter'}"
        )
    part.requires_grad_(True)
    built = sum(p.numel() for p in part.parameters())
    if built != option.cost.trainable:
        raise BudgetMismatch(
            f"{option.key} of size {option.size} has {built:,} parameters, its cost says {option.cost.trainable:,}"
        )
    return part


def _attach(model: nn.Module, parts: Mapping[str, Part], switch: Switch, undo: ExitStack) -> None:
    """Make what is trained part of the model, and override the forwards of the hosts."""
    by_host: dict[str, list[Adapter]] = {}
    for key, part in parts.items():
        if isinstance(part, Shared):
            _shelve(model, "", key, part, undo)
            for adapter in part.adapters():
                by_host.setdefault(adapter.site.module, []).append(adapter)
        elif isinstance(part, Adapter):
            _shelve(model, part.site.module, key, part, undo)
            by_host.setdefault(part.site.module, []).append(part)
    entries: dict[str, EntryForward] = {}
    for path in dict.fromkeys(a.site.entry for members in by_host.values() for a in members if a.reads_entry):
        if not path:
            raise UsageError("an adapter reads the residual stream in front of a branch whose norm is not known")
        norm = model.get_submodule(path)
        entries[path] = EntryForward(norm.forward, switch)
        # Its own adapters, if it has any, are put around this one below.
        _override(norm, entries[path], undo)
    for path, members in by_host.items():
        host = model.get_submodule(path)
        _override(host, HostForward(host, host.forward, members, switch, entries), undo)


def _shelve(model: nn.Module, path: str, key: str, part: Part, undo: ExitStack) -> None:
    """Make it a child of its host, or of the nearest module that is no container."""
    keeper = model.get_submodule(path)
    while isinstance(keeper, _CONTAINERS):
        if not path:
            raise UsageError(
                f"{key} needs a module that can hold it, and every module around it is a plain container; "
                f"wrap the model in a module with a forward of its own"
            )
        path = path.rpartition(".")[0]
        keeper = model.get_submodule(path)
    shelf = keeper._modules.get(CHILD)
    if shelf is None:
        shelf = nn.ModuleDict()
        keeper.add_module(CHILD, shelf)
        undo.callback(keeper._modules.pop, CHILD)
    assert isinstance(shelf, nn.ModuleDict)
    shelf[key.replace(".", ":")] = part


def _override(host: nn.Module, forward: EntryForward | HostForward, undo: ExitStack) -> None:
    attributes = vars(host)
    if "forward" in attributes:
        undo.callback(attributes.__setitem__, "forward", attributes["forward"])
    else:
        undo.callback(attributes.__delitem__, "forward")
    attributes["forward"] = forward


def _copy_heads(
    model: nn.Module, catalog: Catalog, state: Mapping[str, Tensor] | None, undo: ExitStack
) -> dict[str, nn.Module]:
    """Put a trainable copy of every head module in its parent's place."""
    heads: dict[str, nn.Module] = {}
    left = dict(state or {})
    for path in catalog.head:
        parent_path, _, name = path.rpartition(".")
        parent = model.get_submodule(parent_path)
        original = parent._modules.get(name)
        if original is None:
            raise UsageError(f"{type(model).__name__} has no head {path!r}; the catalogue belongs to another model")
        twin = copy.deepcopy(original).requires_grad_(True)
        if state is not None:
            own = {key: left.pop(f"{path}.{key}") for key in twin.state_dict() if f"{path}.{key}" in left}
            try:
                twin.load_state_dict(own, strict=True)
            except RuntimeError as error:
                raise UsageError(f"the given head does not fit {path!r}: {error}") from error
        undo.callback(parent._modules.__setitem__, name, original)
        parent._modules[name] = twin
        heads[path] = twin
    if left:
        raise UsageError(
            f"the given head has tensors that the model's head ({', '.join(catalog.head) or 'none'}) lacks: "
            f"{', '.join(sorted(left)[:5])}"
        )
    return heads
