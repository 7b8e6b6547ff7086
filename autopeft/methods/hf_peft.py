"""Any adapter type of Hugging Face PEFT that works on an image model."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from autopeft.core.budget import Cost
from autopeft.core.menu import Indices, Option
from autopeft.core.scores import Evidence, TensorEvidence
from autopeft.core.site import Site, Slot
from autopeft.errors import UsageError
from autopeft.methods._peft_layer import check_fields
from autopeft.methods._peft_tuner import Tuner
from autopeft.methods._peft_tuners import tuner_of
from autopeft.methods._spectrum import captured, energy, squared_singular_values
from autopeft.methods.base import Part
from autopeft.methods.peft_adapter import PeftAdapter, PeftShared

__all__ = ["HfPeft"]


@dataclass(frozen=True, slots=True)
class HfPeft:
    """One adapter type of PEFT (Mangrulkar et al., 2022) with its own fields, offered size by size on every site.

    In a study: `methods: {lokr: {type: peft, tuner: lokr, fields: {decompose_both: true}}}`. The layer that runs is
    PEFT's, built on each site alone, so that every site has a size of its own whether PEFT has patterns for it or not.
    Its price is counted from the layer that PEFT builds for a site of this shape. Scales are set so that alpha equals
    the rank, starts so that nothing changes at step 0 where the type allows it, and what follows from the host's
    weight or from a key is not stored. Types whose sites train one common vector (`vblora`, `unilora`) are offered on
    groups. `eva`, `lora_ga` and `adalora` look at the data or across sites and need the backend `hf_peft`.

    A size that PEFT refuses (a block size that does not divide, an odd rank of a paired start) is not offered, and
    asking for it raises.

    Attributes:
        tuner: PEFT's name of the type, in lower case, or a variant of LoRA: `dora`, `rslora`, `pissa`, `olora`,
            `orthogonal`, `eva`, `lora_ga`.
        fields: fields of PEFT's configuration class, but for where the adapter goes and how large it is.
        size: the field that the plan's size sets, when it is not the usual one of the type.
    """

    tuner: str = "lora"
    fields: Mapping[str, Any] = field(default_factory=dict)
    size: str | None = None

    def __post_init__(self) -> None:
        check_fields(self.tuner, tuner_of(self.tuner), self.fields, self.size)

    @property
    def family(self) -> str:
        """That of the type."""
        return self._known.family

    @property
    def _known(self) -> Tuner:
        return tuner_of(self.tuner)

    def slots(self, site: Site) -> tuple[Slot, ...]:
        """What the type changes of a Linear, convolution or LayerNorm; of a group, what it changes of its members."""
        return self._occupied(site) if self.sizes(site) else ()

    def parts(self, site: Site) -> tuple[tuple[Site, tuple[Slot, ...]], ...]:
        """The members of a group that the type works on, for types that share a trained vector; at least two."""
        if not self._known.shared or site.kind != "group":
            return ()
        found = tuple((member, slots) for member in site.members if (slots := self._known.slots(member)))
        return found if len(found) > 1 else ()

    def _occupied(self, site: Site) -> tuple[Slot, ...]:
        if self._known.shared:
            taken = {slot for _, slots in self.parts(site) for slot in slots}
            order: tuple[Slot, ...] = ("weight", "bias", "output")
            return tuple(slot for slot in order if slot in taken)
        if self._feeds_forward(site) and self._known.slots(site):
            # IA3 scales the input of these, which is a change of the weight's columns.
            return ("weight",)
        return self._known.slots(site)

    def _feeds_forward(self, site: Site) -> bool:
        wanted = self.fields.get("feedforward_modules")
        if not wanted:
            return False
        if isinstance(wanted, str):
            return re.fullmatch(wanted, site.module) is not None
        return any(site.module == name or site.module.endswith(f".{name}") for name in wanted)

    def sizes(self, site: Site) -> tuple[int, ...]:
        """The sizes that PEFT takes on this site, each dearer than the one before and cheaper than the weight itself.

        Ranks are powers of two; for the other dimensions see the type's `size` field in PEFT.
        """
        if not self._occupied(site):
            return ()
        usual = self._known.sizes(_narrowed(site, self.parts(site)))
        if self.size is not None:
            usual = tuple(1 << i for i in range(11))
        # A copy of the layer (LN_TUNING) and a vector per channel may be as large as what they change.
        most = math.inf if self._known.gain in ("all", "rows") else sum(m.n_weight for m in site.members or (site,))
        found: list[int] = []
        last = 0
        for size in usual:
            price = self._price(site, size)
            if isinstance(price, str) or price.trainable <= last:
                continue
            if price.trainable >= most:
                break
            found.append(size)
            last = price.trainable
        return tuple(found)

    def cost(self, site: Site, size: int) -> Cost:
        """Counted from the layer that PEFT builds; every entry of the weight counts as changed but for sparse types.

        Raises:
            UsageError: with PEFT's own words when it does not take the size.
        """
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise UsageError(f"peft: a size of {self.tuner} on {site.name} is a whole number from 1, got {size!r}")
        if not self._occupied(site):
            raise UsageError(f"peft: {self.tuner} cannot be used on {site.name} ({site.kind} of shape {site.shape})")
        price = self._price(site, size)
        if isinstance(price, str):
            raise UsageError(price)
        return price

    def _price(self, site: Site, size: int) -> Cost | str:
        count, cheaper = self._known.count, self._known.cheaper
        if (count is not None or cheaper) and self.size is None:
            # What is not built does not refuse.
            most = max(self._known.sizes(site)) if count is not None else min(site.in_features, site.out_features)
            if size > most:
                return f"peft: {self.tuner} on {site.name} takes a size of at most {most}, got {size}"
        if count is not None and self.size is None:
            return Cost.plain(count(site, size), entries=site.n_weight, tensors=2)
        settings = self._settings(site, size)
        parts = self.parts(site) or ((site, self._occupied(site)),)
        shapes = tuple((m.kind, m.shape, m.groups, m.has_bias, slots) for m, slots in parts)
        return _counted(self.tuner, json.dumps(settings, sort_keys=True), shapes, site.kind == "group")

    def _settings(self, site: Site, size: int) -> dict[str, Any]:
        """The configuration's fields for a size on a site: the type's, then the size's, then the study's."""
        known = self._known
        chosen = known.settings(_narrowed(site, self.parts(site)), size) if self.size is None else {self.size: size}
        settings = {**known.fixed, **chosen, **self.fields}
        if self.tuner == "ia3":
            settings["feedforward_modules"] = ["it"] if self._feeds_forward(site) else []
        if known.start == "data" and "eva_config" in known.fixed:
            settings["eva_config"] = {**known.fixed["eva_config"], **settings["eva_config"]}
        return settings

    def mergeable(self, site: Site) -> bool:
        """Whether PEFT can merge the type."""
        return self._known.merges

    def build(self, site: Site, option: Option, host: nn.Module, generator: torch.Generator) -> Part:
        """PEFT's layer on the host, initialised by PEFT from a seed that the generator draws.

        Raises:
            UsageError: when PEFT refuses, or would be wrong on this host.
        """
        self.cost(site, option.size)
        settings = self._settings(site, option.size)
        seed = int(torch.randint(1 << 62, (), generator=generator))
        if self._known.shared:
            return PeftShared(site, self.parts(site), self.tuner, self._known, settings, host, seed)
        adapter = PeftAdapter.on(site, self._occupied(site), self.tuner, self._known, settings, host, seed)
        adapter.rank_in_scale = bool(settings.get("use_rslora"))
        if settings.get("init_lora_weights") in ("eva", "lora_ga"):
            adapter.waiting = "starts from the training data, which this backend does not show it"
        elif self.tuner == "adalora":
            adapter.waiting = "shares its ranks with the other sites, and this backend does not bring them together"
        return adapter

    def gains(self, site: Site, evidence: Evidence, sizes: Sequence[int]) -> tuple[float, ...]:
        """The signal's energy that a step of the type can capture.

        Low-rank types: the sum of the r largest squared singular values. Per-channel scales (`ia3`): the signal's
        projection on the rows of weight and bias. Whole tensors (`ln_tuning`, `beft`): all of it. The largest entries
        (`supertuning`): the energy at those entries. Every other type trains p of n dimensions that know nothing of
        the data, and gets the expectation p / n of the energy.
        """
        known = self._known
        members = [(m, evidence.members[m.name], s) for m, s in self.parts(site)]
        found = members or [(site, evidence, self._occupied(site))]
        slots = [
            (slot, tensor)
            for member, seen, taken in found
            for slot in (("weight", "bias") if "output" in taken else taken)
            if (tensor := seen.get(slot)) is not None and (slot != "bias" or member.has_bias)
        ]
        total = sum(energy(tensor.signal) for _, tensor in slots)
        if known.gain == "rank" and self.size is None:
            return captured(squared_singular_values(evidence["weight"].signal.flatten(1)), sizes)
        if known.gain == "all":
            return (total,) * len(sizes)
        if known.gain == "rows" and not self._feeds_forward(site):
            return (_row_energy([tensor for _, tensor in slots]),) * len(sizes)
        if known.gain == "largest" and self.size is None:
            value, signal = (t.detach().cpu().flatten() for t in (evidence["weight"].value, evidence["weight"].signal))
            order = torch.argsort(value.abs(), descending=bool(self.fields.get("select_top", True)), stable=True)
            return captured(signal[order[: max(sizes)]].double().square(), sizes)
        n = sum(tensor.signal.numel() for _, tensor in slots)
        return tuple(total * min(1.0, self.cost(site, size).trainable / n) for size in sizes)

    def select(self, site: Site, evidence: Evidence, size: int) -> Indices | None:
        """None: PEFT's types choose their own entries."""
        return None


def _narrowed(site: Site, parts: Sequence[tuple[Site, tuple[Slot, ...]]]) -> Site:
    """A group with the members alone that a type works on, which its sizes are figured from."""
    if not parts:
        return site
    return replace(site, shape=(len(parts),), members=tuple(member for member, _ in parts))


def _row_energy(tensors: Sequence[TensorEvidence]) -> float:
    """Squared norm of the projection of the signal on the span of the rows of value, each row with its bias."""
    rows = len(tensors[0].value)
    along = torch.zeros(rows, dtype=torch.float64)
    norm = torch.zeros(rows, dtype=torch.float64)
    for tensor in tensors:
        value, signal = (t.detach().cpu().double().reshape(rows, -1) for t in (tensor.value, tensor.signal))
        along += (value * signal).sum(1)
        norm += value.square().sum(1)
    return float((along.square() / norm.clamp_min(torch.finfo(torch.float64).tiny)).sum())


_Shape = tuple[str, tuple[int, ...], int, bool, tuple[Slot, ...]]


@functools.lru_cache(maxsize=8192)
def _counted(name: str, settings: str, shapes: tuple[_Shape, ...], group: bool) -> Cost | str:
    """The price of what PEFT builds on lone modules of these shapes, or why it builds nothing."""
    reason = ""
    # Without values first, which costs nothing; starts that look at the weight need some.
    for device in ("meta", "cpu"):
        try:
            part = _lone(name, json.loads(settings), shapes, group, device)
        except UsageError as error:
            reason = str(error)
            continue
        stored = part.stored()
        entries = sum(math.prod(shape) for _, shape, _, _, slots in shapes if set(slots) & {"weight", "output"})
        entries += sum(
            shape[0] for _, shape, _, has_bias, slots in shapes if has_bias and {"bias", "output"} & set(slots)
        )
        trainable = sum(p.numel() for p in part.parameters())
        return Cost(
            trainable=trainable,
            stored=sum(t.numel() for t in stored.values()),
            bits=sum(8 * t.numel() * t.element_size() for t in stored.values()),
            entries=min(entries, trainable) if tuner_of(name).family == "entries" else entries,
            tensors=len(stored),
        )
    return reason


def _lone(name: str, settings: Mapping[str, Any], shapes: tuple[_Shape, ...], group: bool, device: str) -> Part:
    tuner = tuner_of(name)
    spared = {key: value for key, value in tuner.cheaper.items() if settings.get(key) == tuner.fixed.get(key)}
    settings = {**settings, **spared}
    sites: list[tuple[Site, tuple[Slot, ...]]] = []
    model = nn.Module()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for i, (kind, shape, groups, has_bias, slots) in enumerate(shapes):
            host = _host(kind, shape, groups, has_bias, device)
            model.add_module(f"h{i}", host)
            site = Site(f"h{i}", f"h{i}", kind, shape, has_bias, 0, "lone", slots, groups=groups)  # type: ignore[arg-type]
            sites.append((site, slots))
    if group:
        whole = Site("*", "", "group", (len(sites),), False, 0, "group", (), members=tuple(s for s, _ in sites))
        return PeftShared(whole, sites, name, tuner, settings, model, 0)
    site, slots = sites[0]
    return PeftAdapter.on(site, slots, name, tuner, settings, model.get_submodule("h0"), 0)


def _host(kind: str, shape: tuple[int, ...], groups: int, has_bias: bool, device: str) -> nn.Module:
    if kind == "linear":
        return nn.Linear(shape[1], shape[0], bias=has_bias, device=device)
    if kind == "conv2d":
        kernel = (shape[2], shape[3])
        return nn.Conv2d(shape[1] * groups, shape[0], kernel, groups=groups, bias=has_bias, device=device)
    return nn.LayerNorm(shape[0], bias=has_bias, device=device)
