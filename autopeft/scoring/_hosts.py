"""The tensors behind a catalogue's places, and scores put together from what is known about them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autopeft.core.scores import Evidence, ScoreOrigin, Scores, TensorEvidence
from autopeft.core.site import Catalog, Place, Site, Slot
from autopeft.errors import Diverged, UsageError
from autopeft.scoring._branches import of_branches

__all__ = ["Hosts", "Known", "assemble"]


@dataclass(frozen=True, slots=True)
class Known:
    """What a scorer found out about one whole tensor; the fields are those of `TensorEvidence`."""

    signal: Tensor
    score: Tensor
    half_a: Tensor | None = None
    half_c: Tensor | None = None
    square: Tensor | None = None
    memory: Tensor | None = None


class Hosts:
    """The parameters that a catalogue's sites live on, each once.

    Attributes:
        parameters: key (`blocks.0.attn.qkv.weight`) to parameter, in catalogue order. A tied parameter is listed under
            the first key alone.
        blocks: the sites of kind `block` that take output adapters.

    Raises:
        UsageError: when the catalogue is not of this model.
    """

    def __init__(self, model: nn.Module, catalog: Catalog) -> None:
        self.parameters: dict[str, nn.Parameter] = {}
        self.blocks: list[Site] = []
        self._keys: dict[tuple[str, Slot], str] = {}
        first: dict[int, str] = {}
        for site in catalog:
            if not site.slots or site.kind == "residual":
                continue
            if site.kind == "block":
                self.blocks.append(site)
                continue
            for slot, name in _tensors_of(site):
                parameter = _parameter(model, site, name)
                key = first.setdefault(id(parameter), f"{site.module}.{name}" if site.module else name)
                self.parameters[key] = parameter
                self._keys[site.name, slot] = key

    def key(self, site: Site, slot: Slot) -> str | None:
        """Key of the tensor behind a slot, None where a site holds none."""
        return self._keys.get((site.name, slot))

    def slots(self, site: Site) -> Iterator[tuple[Slot, str]]:
        """The slots of a site that a tensor is behind, with its key."""
        for slot in ("weight", "bias", "tokens"):
            key = self.key(site, slot)
            if key is not None:
                yield slot, key


def assemble(catalog: Catalog, hosts: Hosts, known: Mapping[str, Known], origin: ScoreOrigin) -> Scores:
    """Scores of a catalogue; slices of a fused projection are views of the whole.

    Args:
        catalog: the catalogue.
        hosts: its tensors.
        known: per key of `hosts.parameters`, and per name of a block's site, what was found out; on the CPU.
        origin: what it was found out from.

    Raises:
        Diverged: when a score is not finite.
    """
    evidence: dict[str, Evidence] = {}
    totals: dict[Place, float] = {}
    for site in catalog:
        slots: dict[str, TensorEvidence] = {}
        for slot, key in hosts.slots(site):
            value = hosts.parameters[key].detach().cpu()
            slots[slot] = _view(site, value, known[key])
        if site.kind == "block" and site.name in known:
            slots["output"] = _view(site, torch.empty(0), known[site.name])
        if slots:
            evidence[site.name] = Evidence(site, slots)
        for slot in site.slots:
            if slot in slots and not site.parts:
                totals[Place(site.name, slot)] = _total(site, slots[slot].score)
    for site in catalog:
        for slot in site.slots if site.parts else ():
            if slot in evidence[site.name].slots:
                parts = [totals[Place(part, slot)] for part in site.parts]
                totals[Place(site.name, slot)] = sum(parts)
    return Scores(origin, totals, evidence | of_branches(catalog, evidence))


def _tensors_of(site: Site) -> Iterator[tuple[Slot, str]]:
    yield ("tokens" if site.kind == "tokens" else "weight"), site.parameter
    if site.has_bias:
        yield "bias", "bias"


def _parameter(model: nn.Module, site: Site, name: str) -> nn.Parameter:
    try:
        parameter = getattr(model.get_submodule(site.module), name)
    except AttributeError as error:
        raise UsageError(f"the catalogue is of another model: this one has no {site.module}.{name}") from error
    if not isinstance(parameter, nn.Parameter):
        raise UsageError(
            f"{site.module}.{name} is not a parameter but a {type(parameter).__name__}; score plain models"
        )
    found, listed = tuple(parameter.shape), site.shape if name == site.parameter else site.shape[:1]
    if site.rows is None and found != listed:
        raise UsageError(f"the catalogue is of another model: {site.name} has shape {found} here, {listed} there")
    return parameter


def _view(site: Site, value: Tensor, known: Known) -> TensorEvidence:
    def cut(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or site.rows is None:
            return tensor
        return tensor[site.rows[0] : site.rows[1]]

    signal, score, value_ = cut(known.signal), cut(known.score), cut(value)
    assert signal is not None
    assert score is not None
    assert value_ is not None
    halves = cut(known.half_a), cut(known.half_c)
    return TensorEvidence(value_, signal, score, *halves, cut(known.square), memory=cut(known.memory))


def _total(site: Site, score: Tensor) -> float:
    total = float(score.sum(dtype=torch.float64))
    if not total < torch.inf:
        raise Diverged(f"the score of {site.name} is {total}: gradients overflow; score the model in float32")
    return total
