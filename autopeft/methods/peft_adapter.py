"""A layer of Hugging Face PEFT as an adapter of a borrowed model."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from autopeft.core.site import Site, Slot
from autopeft.errors import UsageError
from autopeft.methods._host import host_tensor
from autopeft.methods._peft_layer import ADAPTER, nested_settings, obstacle_of, stand_in, start_of, wrap
from autopeft.methods._peft_tuner import Tuner
from autopeft.methods.base import Adapter, Form, Shared

__all__ = ["PeftAdapter", "PeftShared"]

_RESIDUE = 1e-3
"""Largest difference, relative to the weight, between what an initialisation took from it and the adapter's start."""


class PeftAdapter(Adapter):
    """Runs PEFT's own layer in the place of its host, or behind it where the layer maps the output alone.

    The layer's base layer is a stand-in that reads the host's tensors when it runs, so that nothing of the model is
    replaced or renamed, and initialisations that move a part of the weight into the adapter (PiSSA, OLoRA, LoRA-GA)
    move it out of the stand-in alone.

    Attributes:
        layer: PEFT's layer. Its base layer is no child.
        tuner: name of the adapter type.
        settings: fields of its configuration, the size's included.
        waiting: what must happen before training; empty when nothing must.
    """

    layer: Any
    start_down: Tensor
    start_up: Tensor
    _host: Callable[[], nn.Module | None]

    def __init__(
        self, site: Site, slots: tuple[Slot, ...], name: str, tuner: Tuner, settings: Mapping[str, Any], seed: int
    ) -> None:
        form: Form = "stand_in" if "weight" in slots else "output"
        super().__init__(site, slots, form, "" if tuner.merges else f"PEFT cannot merge {name}")
        self.tuner = name
        self.settings = dict(settings)
        self.seed = seed
        self.waiting = ""
        self._passing: tuple[str, ...] = ()
        self._base_moved = False
        self._start = start_of(settings)
        self._residual: tuple[tuple[Any, ...], Tensor] | None = None

    @classmethod
    def on(
        cls,
        site: Site,
        slots: tuple[Slot, ...],
        name: str,
        tuner: Tuner,
        settings: Mapping[str, Any],
        host: nn.Module,
        seed: int,
    ) -> PeftAdapter:
        """The adapter for one host.

        Args:
            site: where.
            slots: what it occupies.
            name: name of the adapter type.
            tuner: what is known of it.
            settings: fields of its configuration, the size's included.
            host: the module it goes on, unchanged.
            seed: seed of PEFT's initialisation, which runs on the CPU whatever the host's device.

        Raises:
            UsageError: when PEFT refuses, or would be wrong on this host.
        """
        adapter = cls(site, slots, name, tuner, settings, seed)
        shadow = adapter._shadow_of(tuner, host)
        (layer,) = wrap(name, tuner, settings, [shadow], seed)
        adapter._take(layer, host)
        return adapter

    def _shadow_of(self, tuner: Tuner, host: nn.Module) -> nn.Module:
        host_tensor(self.site, host, self.site.parameter)
        if reason := obstacle_of(self.tuner, tuner, self.site, host):
            raise UsageError(f"peft: {self.tuner} cannot go on {self.site.name}: {reason}; choose another method there")
        return stand_in(host, exact=self._start == "" and not tuner.single)

    def _take(self, layer: Any, host: nn.Module) -> None:
        """Adopt a layer that was built on a stand-in of the host."""
        weight = host_tensor(self.site, host, self.site.parameter)
        wide = weight.dtype == torch.float64
        object.__setattr__(self, "_host", weakref.ref(host))
        self.layer = layer
        if weight.device.type != "meta":
            layer.to(device=weight.device, dtype=torch.float64 if wide else torch.float32)
            self._check_base(weight)
        layer.base_layer._parameters.update(host._parameters)
        if self._start:
            persistent = self._start == "stored"
            taken = start_of(self.settings) == "recomputed" or self._base_moved
            for key, factor in (("start_down", "lora_A"), ("start_up", "lora_B")):
                tensor = getattr(layer, factor)[ADAPTER].weight.detach().clone()
                self.register_buffer(key, tensor if taken else torch.zeros_like(tensor), persistent=persistent)
        self.__dict__["moving"] = frozenset(n for n in self.state_dict() if n not in dict(self.named_parameters()))

    def _check_base(self, weight: Tensor) -> None:
        """The stand-in may have lost what the adapter starts from, and nothing else."""
        now = self.layer.base_layer._parameters.get(self.site.parameter)
        before = weight.detach().to(device="cpu", dtype=torch.float32)
        gone = before - now.detach().to(device="cpu", dtype=torch.float32)
        self._base_moved = bool(gone.any())
        if not self._base_moved:
            return
        taken = self._product(*(getattr(self.layer, f)[ADAPTER].weight.detach() for f in ("lora_A", "lora_B")))
        error = float((gone - taken.to(gone)).norm() / before.norm())
        if not self._start or error > _RESIDUE:
            raise UsageError(
                f"peft: {self.tuner} with these fields changes the weight of {self.site.name} for good ({error:.1e} of "
                f"it), and the model is only borrowed"
            )

    def _product(self, down: Tensor, up: Tensor) -> Tensor:
        return float(self.layer.scaling[ADAPTER]) * (up @ down)

    def around(self, run: Callable[..., Any], *args: Any) -> Any:
        """PEFT's forward on the host's present tensors; `run` is the host's own forward, which the layer contains."""
        host = self._host()
        if host is None:
            raise UsageError(f"the host of {self.site.name} is gone; its adapter cannot run")
        held = self.layer.base_layer._parameters
        held.update(host._parameters)
        if self._start:
            held["weight"] = self._rest(host_tensor(self.site, host, "weight"))
        return self.layer(*args)

    def transform(self, y: Tensor) -> Tensor:
        """PEFT's forward with `y` as what its base layer gives, for types that look at nothing else."""
        base = vars(self.layer.base_layer)
        base["forward"] = lambda x: y
        try:
            mapped: Tensor = self.layer(y)
        finally:
            del base["forward"]
        return mapped

    def _rest(self, weight: Tensor) -> Tensor:
        """The weight without what the adapter starts from, computed again when either has changed."""
        stamp = (id(weight), weight._version, weight.device, self.start_down._version, self.start_up._version)
        if self._residual is None or self._residual[0] != stamp:
            with torch.no_grad():
                rest = weight.detach() - self._product(self.start_down, self.start_up).to(weight)
            self._residual = (stamp, rest)
        return self._residual[1]

    def restart(self, down: Tensor, up: Tensor | None) -> None:
        """Begin from other factors, for starts that look at the data.

        Args:
            down: A, (r, in_features).
            up: B, (out_features, r), when the product is to be taken from the base's weight; None leaves B and the
                weight alone.
        """
        factors = [(self.layer.lora_A, down)] + ([(self.layer.lora_B, up)] if up is not None else [])
        with torch.no_grad():
            for holder, tensor in factors:
                holder[ADAPTER].weight.copy_(tensor)
            if up is not None:
                self.start_down.copy_(down)
                self.start_up.copy_(up)
        self.waiting = ""

    def merge(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """PEFT's own merge, on a copy; without gradient."""
        names = {"weight": self.site.parameter, "bias": "bias"}
        layer = copy.deepcopy(self.layer)
        held = layer.base_layer._parameters
        for slot, tensor in tensors.items():
            held[names[slot]] = nn.Parameter(tensor.detach().clone(), requires_grad=False)
        if self._start:
            held["weight"].data -= self._product(self.start_down, self.start_up).to(held["weight"])
        with torch.no_grad():
            layer.merge()
        after = layer.get_base_layer()._parameters
        found = {}
        for slot, tensor in tensors.items():
            merged = after[names[slot]].detach()
            found[slot] = tensor if torch.equal(merged, tensor) else merged
        return found

    def restart_from_gradient(self, gradient: Tensor, seed: int) -> None:
        """Begin as LoRA-GA does, by PEFT's own initialisation.

        Args:
            gradient: mean gradient of the host's weight, of its shape.
            seed: seed of the randomised decomposition.
        """
        layer, shadow = self.layer, self.layer.base_layer
        weight = shadow._parameters["weight"]
        factors = [getattr(layer, key)[ADAPTER].weight for key in ("lora_A", "lora_B")]
        shapes = [f.shape for f in factors]
        # PEFT subtracts the start from the weight it finds; the model's own must not be the one.
        shadow._parameters["weight"] = nn.Parameter(weight.detach().clone(), requires_grad=False)
        shadow._peft_loraga_grad = gradient
        devices = [weight.device] if weight.device.type == "cuda" else []
        config = nested_settings({"lora_ga_config": self.settings.get("lora_ga_config")}, ())["lora_ga_config"]
        try:
            with torch.random.fork_rng(devices=devices):
                torch.manual_seed(seed)
                layer.lora_ga_init(ADAPTER, config)
        finally:
            shadow._parameters["weight"] = weight
            vars(shadow).pop("_peft_loraga_grad", None)
        down, up = (f.detach().clone() for f in factors)
        if [f.shape for f in factors] != shapes:
            raise UsageError(
                f"LoRA-GA finds {down.shape[0]} directions in the gradient of {self.site.name}, the plan's rank is "
                f"{self.start_down.shape[0]}; it can be at most half of the smaller side"
            )
        for factor in factors:
            factor.data = factor.data.to(self.start_down.dtype)
        self.restart(down, up)

    def keep_while_training(self, name: str, tensor: Tensor) -> None:
        """Add a buffer that a checkpoint holds and an export does not."""
        self.register_buffer(name, tensor)
        self._passing = (*self._passing, name)
        self.__dict__["moving"] = self.moving | {name}

    def stored(self) -> dict[str, Tensor]:
        """The state without what only training needs."""
        return {name: tensor for name, tensor in self.state_dict().items() if name not in self._passing}

    def load_stored(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up what `stored` gave; what only training needs stays as it is."""
        own = self.state_dict()
        super().load_stored({**tensors, **{name: own[name] for name in self._passing}})

    def low_rank(self) -> tuple[Tensor, Tensor] | None:
        """The factors where the layer is a plain LoRA; with a start of its own, those of the difference."""
        layer = self.layer
        if type(layer).__module__ != "peft.tuners.lora.layer" or getattr(layer, "lora_variant", None):
            return None
        down, up = (getattr(layer, f)[ADAPTER].weight.detach().flatten(1) for f in ("lora_A", "lora_B"))
        scale = float(layer.scaling[ADAPTER])
        if self._start:
            down, up = torch.cat([down, self.start_down]), torch.cat([up, -self.start_up], dim=1)
        return down.clone(), scale * up

    def advance(self, step: int, total: int) -> bool:
        """Refuse to train from a start that was never made."""
        if self.waiting and step == 0:
            raise UsageError(f"{self.tuner} on {self.site.name} {self.waiting}; set `backend: hf_peft`")
        return False


class PeftShared(Shared):
    """Layers of PEFT on several hosts that share trained tensors.

    Args:
        site: the group.
        members: each member with the slots it occupies.
        name: name of the adapter type.
        tuner: what is known of it.
        settings: fields of its configuration, the size's included.
        model: the model.
        seed: seed of PEFT's initialisation.
    """

    def __init__(
        self,
        site: Site,
        members: Sequence[tuple[Site, tuple[Slot, ...]]],
        name: str,
        tuner: Tuner,
        settings: Mapping[str, Any],
        model: nn.Module,
        seed: int,
    ) -> None:
        super().__init__(site)
        hosts = [model.get_submodule(member.module) for member, _ in members]
        adapters = [PeftAdapter(member, slots, name, tuner, settings, seed) for member, slots in members]
        shadows = [adapter._shadow_of(tuner, host) for adapter, host in zip(adapters, hosts, strict=True)]
        layers = wrap(name, tuner, settings, shadows, seed)
        seen: dict[int, int] = {}
        for layer in layers:
            for child in layer.children():
                seen[id(child)] = seen.get(id(child), 0) + 1
        for adapter, layer, host in zip(adapters, layers, hosts, strict=True):
            for key, child in list(layer._modules.items()):
                if seen[id(child)] > 1:
                    del layer._modules[key]
                    object.__setattr__(layer, key, child)
                    self.add_module(key, child)
            adapter._take(layer, host)
            self.add(adapter)
        first = hosts[0].get_parameter(members[0][0].parameter)
        if first.device.type != "meta":
            self.to(device=first.device, dtype=torch.float64 if first.dtype == torch.float64 else torch.float32)
