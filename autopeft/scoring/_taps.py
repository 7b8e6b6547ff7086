"""The layers whose per-sample gradients a formula gives, and the parameters that a copy per sample can replace."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from autopeft.core.site import Catalog, Site, Slot
from autopeft.scoring._hooks import when_complete
from autopeft.scoring._hosts import Hosts

__all__ = ["Blocks", "Tap", "dropping", "requiring", "taps_of"]

Blocks = Mapping[str, tuple[Site, nn.Module]]


@dataclass(frozen=True, slots=True)
class Tap:
    """A layer whose input and output gradient are looked at: the keys of the tensors that they give, by slot."""

    site: Site
    module: nn.Module
    keys: dict[Slot, str]


def taps_of(
    model: nn.Module, catalog: Catalog, hosts: Hosts, blocks: Blocks
) -> tuple[dict[str, Tap], dict[str, tuple[nn.Module, str]]]:
    """The layers with a formula, by site name, and the tensors a copy per sample may replace, with their holders."""
    taps: dict[str, Tap] = {}
    held: dict[str, tuple[nn.Module, str]] = {}
    users: dict[str, int] = {}
    for site in catalog:
        if site.parent or not site.slots or (site.kind == "block" and site.name not in blocks):
            continue
        module = model.get_submodule(site.module)
        keys = dict(hosts.slots(site))
        for key in keys.values():
            users[key] = users.get(key, 0) + 1
        if site.kind == "tokens":
            if site.shape[0] == 1:
                held[keys["tokens"]] = (module, site.parameter)
            continue
        taps[site.name] = Tap(site, module, {"output": site.name} if site.kind == "block" else keys)
    shared = {key for key, n in users.items() if n > 1}
    for tap in taps.values():
        for slot in [slot for slot, key in tap.keys.items() if key in shared]:
            del tap.keys[slot]
    return taps, {key: holder for key, holder in held.items() if key not in shared}


@contextlib.contextmanager
def dropping(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Free the gradients of these parameters as soon as they are complete."""

    def drop(parameter: Tensor) -> None:
        parameter.grad = None

    with contextlib.ExitStack() as stack:
        for parameter in parameters:
            stack.callback(when_complete(parameter, drop))
        yield


@contextlib.contextmanager
def requiring(parameters: Mapping[str, nn.Parameter], keys: Collection[str]) -> Iterator[None]:
    """Let these parameters alone require a gradient; all of them do on exit."""
    for key, parameter in parameters.items():
        parameter.requires_grad_(key in keys)
    try:
        yield
    finally:
        for parameter in parameters.values():
            parameter.requires_grad_()
