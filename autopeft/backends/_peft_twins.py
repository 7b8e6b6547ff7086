"""Native adapters that run through the layer of PEFT that computes the same."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from autopeft.core.budget import Cost
from autopeft.core.contracts import Method
from autopeft.core.menu import Indices, Option
from autopeft.core.scores import Evidence
from autopeft.core.site import Site, Slot
from autopeft.methods._axis import along
from autopeft.methods._host import is_plain
from autopeft.methods._peft_layer import ADAPTER, stand_in, wrap
from autopeft.methods._peft_tuners import TUNERS
from autopeft.methods.base import Adapter
from autopeft.methods.dora import DoRA, DoRAAdapter
from autopeft.methods.lora import LoRA, LoRAAdapter
from autopeft.methods.sparse import Sparse, SparseAdapter
from autopeft.methods.ssf import SSF, SSFAdapter

__all__ = ["Twin", "has_twin"]

_Feed = Callable[[Any], None]


def has_twin(method: Method, site: Site, size: int, host: nn.Module) -> bool:
    """Whether PEFT computes exactly what a native option does.

    LoRA and DoRA on plain, undilated hosts without groups; sparse weights of a Linear whose number is a multiple of
    `in + out`, the only numbers that SHiRA takes; SSF on Linear, convolutions and LayerNorms, as a layer of our own
    that PEFT hosts.
    """
    if site.rows is not None:
        return False
    if isinstance(method, SSF):
        return site.kind in ("linear", "conv2d", "layer_norm") and "forward" not in vars(host)
    if not is_plain(host) or any(d != 1 for d in getattr(host, "dilation", (1,))) or site.groups > 1:
        return False
    if isinstance(method, LoRA):
        return True
    if isinstance(method, DoRA):
        return method.detach_norm
    if isinstance(method, Sparse):
        whole = size % (site.in_features + site.out_features) == 0
        return method.slot == "weight" and site.kind == "linear" and whole
    return False


@dataclass(frozen=True, slots=True)
class Twin:
    """A native method whose adapters on some sites run through PEFT's layers, with the native names and merge.

    Attributes:
        method: the native method.
        sites: names of these sites.
    """

    method: Method
    sites: frozenset[str]

    @property
    def family(self) -> str:
        """The native method's."""
        return self.method.family

    def slots(self, site: Site) -> tuple[Slot, ...]:
        """The native method's."""
        return self.method.slots(site)

    def sizes(self, site: Site) -> tuple[int, ...]:
        """The native method's."""
        return self.method.sizes(site)

    def cost(self, site: Site, size: int) -> Cost:
        """The native method's."""
        return self.method.cost(site, size)

    def mergeable(self, site: Site) -> bool:
        """The native method's."""
        return self.method.mergeable(site)

    def gains(self, site: Site, evidence: Evidence, sizes: Sequence[int]) -> tuple[float, ...]:
        """The native method's."""
        return self.method.gains(site, evidence, sizes)

    def select(self, site: Site, evidence: Evidence, size: int) -> Indices | None:
        """The native method's."""
        return self.method.select(site, evidence, size)

    def build(self, site: Site, option: Option, host: nn.Module, generator: torch.Generator) -> nn.Module:
        """The native adapter; on the chosen sites PEFT's layer reads its tensors and runs in the host's place."""
        adapter = self.method.build(site, option, host, generator)
        if site.name not in self.sites or not isinstance(adapter, Adapter):
            return adapter
        layer, feed = _layer_for(adapter, stand_in(host))
        layer.to(device=next(adapter.parameters()).device)
        adapter.form = "stand_in"
        # An adapter's behaviour is exchanged on the instance, as a backend exchanges a host's forward.
        object.__setattr__(adapter, "around", _Run(layer, feed, weakref.ref(host)))
        return adapter


@dataclass(slots=True, eq=False)
class _Run:
    """Calls PEFT's layer on the host's present tensors and the native adapter's."""

    layer: Any
    feed: _Feed
    host: Callable[[], nn.Module | None]

    def __call__(self, run: Callable[..., Any], *args: Any) -> Any:
        host = self.host()
        if host is not None:
            self.layer.base_layer._parameters.update(host._parameters)
        self.feed(self.layer)
        return self.layer(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Run:
        """Copies merge and do not run: they share what runs."""
        return self


def _layer_for(adapter: Adapter, host: nn.Module) -> tuple[Any, _Feed]:
    """PEFT's layer on a stand-in, and how it is given the adapter's tensors before it runs."""
    if isinstance(adapter, LoRAAdapter | DoRAAdapter):
        rank = adapter.A.shape[0]
        name = "lora" if isinstance(adapter, LoRAAdapter) else "dora"
        (layer,) = wrap(name, TUNERS[name], {**TUNERS[name].fixed, "r": rank, "lora_alpha": rank}, [host], 0)
        layer.scaling[ADAPTER] = adapter.scale
        return layer, functools.partial(_feed_lora, adapter)
    if isinstance(adapter, SparseAdapter):
        shape = adapter.site.shape
        rank = len(adapter.values) // sum(shape)
        (layer,) = wrap("shira", TUNERS["shira"], {"r": rank}, [host], 0, functools.partial(_mask, adapter))
        return layer, functools.partial(_feed_sparse, adapter)
    assert isinstance(adapter, SSFAdapter), f"no twin of {type(adapter).__name__}"
    (layer,) = wrap("lora", TUNERS["lora"], {"r": 1}, [host], 0, _host_ssf)
    layer.axis = adapter.site.channel_axis
    return layer, functools.partial(_feed_ssf, adapter)


def _feed_lora(adapter: LoRAAdapter | DoRAAdapter, layer: Any) -> None:
    # Flat in the native adapter, kernels in PEFT's convolutions.
    for factor, tensor in (("lora_A", adapter.A), ("lora_B", adapter.B)):
        held = getattr(layer, factor)[ADAPTER]._parameters
        held["weight"] = tensor if tensor.shape == held["weight"].shape else tensor.view(held["weight"].shape)
    if isinstance(adapter, DoRAAdapter):
        held = layer.lora_magnitude_vector[ADAPTER]._parameters
        held["weight"] = (adapter.norm + adapter.magnitude).view(held["weight"].shape)


def _feed_sparse(adapter: SparseAdapter, layer: Any) -> None:
    layer.shira_weight._parameters[ADAPTER] = adapter.values


def _feed_ssf(adapter: SSFAdapter, layer: Any) -> None:
    layer.lora_scale._parameters[ADAPTER] = adapter.scale
    layer.lora_shift._parameters[ADAPTER] = adapter.shift


def _mask(adapter: SparseAdapter, config: Any) -> None:
    """Let SHiRA take the entries that the plan chose."""
    size = adapter.site.n_weight
    chosen = torch.zeros(size).index_fill_(0, adapter.index.long().cpu(), 1.0).view(adapter.site.shape)

    def mask(base_layer: nn.Module, r: int, random_seed: int | None = None) -> Tensor:
        return chosen

    config.mask_fn = mask


def _host_ssf(config: Any) -> None:
    config._register_custom_module(dict.fromkeys((nn.Linear, nn.Conv2d, nn.Module), _ssf_layer()))


@functools.cache
def _ssf_layer() -> type[nn.Module]:
    """SSF as a layer of PEFT, which has none: PEFT hosts layers of other packages in the place of LoRA's."""
    from peft.tuners.lora.layer import LoraLayer

    class SsfLayer(nn.Module, LoraLayer):  # type: ignore[misc]  # PEFT is not typed
        adapter_layer_names = ("lora_scale", "lora_shift")
        axis: int = -1
        base_layer: nn.Module
        r: dict[str, int]
        lora_alpha: dict[str, int]
        scaling: dict[str, float]
        lora_scale: nn.ParameterDict
        lora_shift: nn.ParameterDict

        def __init__(
            self, base_layer: nn.Module, adapter_name: str, config: Any, r: int, lora_alpha: int, **_: Any
        ) -> None:
            super().__init__()
            self.lora_scale = nn.ParameterDict()
            self.lora_shift = nn.ParameterDict()
            LoraLayer.__init__(self, base_layer)
            self._active_adapter = adapter_name
            self.update_layer(adapter_name, r, lora_alpha, config=config)

        def _get_in_out_features(self, module: nn.Module) -> tuple[None, None]:
            return None, None

        def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any, **_: Any) -> None:
            rows = len(self.base_layer.get_parameter("weight"))
            self.r[adapter_name], self.lora_alpha[adapter_name], self.scaling[adapter_name] = r, lora_alpha, 1.0
            self.lora_scale[adapter_name] = nn.Parameter(torch.zeros(rows))
            self.lora_shift[adapter_name] = nn.Parameter(torch.zeros(rows))
            LoraLayer.set_adapter(self, [adapter_name])

        def forward(self, x: Tensor, *args: Any) -> Tensor:
            y: Tensor = self.base_layer(x, *args)
            if self.disable_adapters or self.merged:
                return y
            for name in self.lora_scale:
                scale, shift = (along(v[name], y.ndim, self.axis) for v in (self.lora_scale, self.lora_shift))
                y = (y.to(scale.dtype) * (1 + scale) + shift).to(y.dtype)
            return y

    return SsfLayer
