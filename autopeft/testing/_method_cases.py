"""The sites that methods are tried on, with evidence about them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autopeft.core.allocation import Allocation
from autopeft.core.budget import Budget
from autopeft.core.contracts import BasedMethod, Method
from autopeft.core.menu import Option
from autopeft.core.places import places_of
from autopeft.core.scores import Evidence, TensorEvidence
from autopeft.core.site import Catalog, Site
from autopeft.methods.base import Part
from autopeft.models.scan import scan
from autopeft.testing.tiny import tiny_convnet, tiny_vit

__all__ = ["KEY", "MODELS", "Case", "Ground", "cases_of", "ground_of", "images", "loss_of"]

KEY = "tested"
"""Method key that the laws use."""

MODELS: Mapping[str, Callable[[], nn.Module]] = {"vit": tiny_vit, "convnet": tiny_convnet}

_SEED = 11


@dataclass(frozen=True)
class Ground:
    """A model's catalogue, and what one backward pass through it shows.

    Attributes:
        name: key of the model in `MODELS`.
        dtype: precision of the model.
        catalog: its sites.
        evidence: per site name; the signal is the gradient, the score its square.
    """

    name: str
    dtype: torch.dtype
    catalog: Catalog
    evidence: Mapping[str, Evidence]

    def about(self, site: Site) -> Evidence:
        """What is known about a site; of a group, about its members."""
        if site.kind != "group":
            return self.evidence[site.name]
        return Evidence(site, {}, {m.name: self.evidence[m.name] for m in site.members})

    def model(self, twin: int = 0) -> nn.Module:
        """A model with these weights, one object per `twin`; shared, since every insertion gives it back as it was."""
        return _model(self.name, self.dtype, twin)


@dataclass(frozen=True)
class Case:
    """One option of the method under test.

    Attributes:
        ground: the model.
        site: the site.
        option: the option; its price is what was built, so that a wrong price fails the law of prices alone.
        allocation: the plan of this option only.
    """

    ground: Ground
    site: Site
    option: Option
    allocation: Allocation

    def __str__(self) -> str:
        return f"{self.ground.name} {self.site.name} size {self.option.size} {self.ground.dtype}"

    def evidence(self) -> Evidence:
        """What is known about the site; of a group, about its members."""
        return self.ground.about(self.site)

    def build(self, method: Method, seed: int = 0) -> Part:
        """What the option trains, alone."""
        host = self.ground.model().get_submodule(self.site.module)
        adapter = method.build(self.site, self.option, host, torch.Generator().manual_seed(seed))
        assert isinstance(adapter, Part), f"{self}: build gave a {type(adapter).__name__}"
        return adapter


def images(dtype: torch.dtype, n: int = 3) -> Tensor:
    """Images (n, 3, 8, 8) that do not depend on the caller's random state."""
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(_SEED), dtype=torch.float64).to(dtype)


def loss_of(logits: Tensor) -> Tensor:
    """A loss whose gradient depends on the logits and vanishes nowhere in particular."""
    target = torch.randn(logits.shape, generator=torch.Generator().manual_seed(_SEED + 1), dtype=torch.float64)
    return (logits - 3 * target.to(logits.dtype)).square().mean()


@functools.lru_cache(maxsize=16)
def _model(name: str, dtype: torch.dtype, twin: int) -> nn.Module:
    return MODELS[name]().to(dtype)


@functools.lru_cache(maxsize=8)
def ground_of(name: str, dtype: torch.dtype) -> Ground:
    """Scan a model and look at one batch."""
    model = MODELS[name]()
    catalog = scan(model)
    model = model.to(dtype).requires_grad_(True)
    outputs: dict[str, Tensor] = {}

    def keep(site: Site) -> Callable[[nn.Module, object, Tensor], None]:
        def hook(module: nn.Module, args: object, output: Tensor) -> None:
            output.retain_grad()
            outputs[site.name] = output

        return hook

    for site in catalog:
        if site.kind in ("block", "residual"):
            model.get_submodule(site.module).register_forward_hook(keep(site))
    torch.autograd.backward(loss_of(model(images(dtype))))
    return Ground(name, dtype, catalog, {site.name: _evidence(model, site, outputs) for site in catalog})


def _evidence(model: nn.Module, site: Site, outputs: Mapping[str, Tensor]) -> Evidence:
    if site.kind in ("block", "residual"):
        y = outputs[site.name]
        assert y.grad is not None
        flat, grad = (t.detach().movedim(site.channel_axis, -1).flatten(0, -2) for t in (y, y.grad))
        matrix = grad.T @ flat
        return Evidence(site, {"output": TensorEvidence(torch.empty(0), matrix, matrix.square())})
    host = model.get_submodule(site.module)
    names = {"tokens" if site.kind == "tokens" else "weight": site.parameter}
    if site.has_bias:
        names["bias"] = "bias"
    slots = {}
    for slot, name in names.items():
        parameter = host.get_parameter(name)
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        start, stop = site.rows or (0, len(parameter))
        value, signal = parameter.detach()[start:stop], grad[start:stop]
        bases = _some_bases(site) if slot == "weight" and site.is_matrix else {}
        slots[slot] = TensorEvidence(value, signal, signal.square(), bases=bases)
    return Evidence(site, slots)


def _some_bases(site: Site) -> dict[str, tuple[Tensor, Tensor]]:
    """Orthonormal bases under every name that methods know, as if they had been measured."""
    rank = min(site.out_features, site.in_features)
    found = {}
    for number, name in enumerate(("activation", "aligned", "trajectory")):
        generator = torch.Generator().manual_seed(_SEED + number)
        draws = (torch.randn(side, rank, generator=generator) for side in (site.out_features, site.in_features))
        left, right = (torch.linalg.qr(draw)[0].contiguous() for draw in draws)
        found[name] = (left, right)
    return found


def cases_of(
    method: Method, names: tuple[str, ...], dtypes: tuple[torch.dtype, ...], *, all_sizes: bool = False
) -> Iterator[Case]:
    """One site of every kind that the method claims, at its smallest and largest size."""
    for name in names:
        for dtype in dtypes:
            ground = ground_of(name, dtype)
            for site in _representatives(method, ground.catalog):
                sizes = method.sizes(site)
                for size in dict.fromkeys(sizes if all_sizes else (sizes[0], sizes[-1])):
                    yield _case(method, ground, site, size)


def _representatives(method: Method, catalog: Catalog) -> list[Site]:
    """The first site of every kind, told apart by what changes the arithmetic."""
    seen: dict[tuple[object, ...], Site] = {}
    for site in (*catalog, *catalog.groups()):
        if method.slots(site):
            kernel = site.shape[2:] if site.kind == "conv2d" else ()
            what = {"group": site.name.partition(":")[0], "residual": site.role}.get(site.kind, "")
            fused = (bool(site.parts), site.rows)
            seen.setdefault((site.kind, what, site.groups > 1, kernel, site.has_bias, *fused), site)
    return list(seen.values())


def _case(method: Method, ground: Ground, site: Site, size: int) -> Case:
    places = places_of(ground.catalog, method, site)
    indices = method.select(site, ground.about(site), size)
    bases = method.bases(site, ground.about(site), size, indices) if isinstance(method, BasedMethod) else None
    option = Option(site.name, KEY, size, method.cost(site, size), 0.0, places, indices, bases)
    case = Case(ground, site, option, Allocation((option,), Budget(10**9)))
    built = sum(p.numel() for p in case.build(method).parameters())
    option = dataclasses.replace(option, cost=dataclasses.replace(option.cost, trainable=built))
    return dataclasses.replace(case, option=option, allocation=Allocation((option,), Budget(10**9)))
