"""Adapters of activations and prompts on real architectures of timm, untrained and small."""

from __future__ import annotations

import copy
import functools

import pytest
import timm
import torch
from torch import nn

from autopeft.backends.native import Native
from autopeft.core.allocation import Allocation
from autopeft.core.budget import Budget
from autopeft.core.contracts import Method
from autopeft.core.menu import Option
from autopeft.core.places import places_of
from autopeft.core.site import Catalog, Site
from autopeft.errors import UsageError
from autopeft.methods.adaptformer import AdaptFormer
from autopeft.methods.convpass import Convpass
from autopeft.methods.earth_adapter import EarthAdapter
from autopeft.methods.houlsby import Houlsby
from autopeft.methods.mosa import MoSA
from autopeft.methods.repadapter import RepAdapter
from autopeft.methods.vpt import VPT
from autopeft.methods.vpt_shallow import VPTShallow
from autopeft.models.scan import scan

SMALL = {"img_size": 32, "depth": 2, "embed_dim": 32, "num_heads": 2}
SWIN = {"img_size": 64, "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4)}
MODELS = {
    "vit": ("vit_tiny_patch16_224", SMALL),
    "registers": ("vit_small_patch14_reg4_dinov2", {**SMALL, "img_size": 28}),
    "deit3": ("deit3_small_patch16_224", {**SMALL, "init_values": 0.5}),
    "beit": ("beit_base_patch16_224", SMALL),
    "eva02": ("eva02_tiny_patch14_224", {**SMALL, "img_size": 28}),
    "swin": ("swin_tiny_patch4_window7_224", SWIN),
    "swinv2": ("swinv2_tiny_window8_256", SWIN),
    "convnext": ("convnext_tiny", {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16), "ls_init_value": 0.5}),
}
METHODS: dict[str, Method] = {
    "houlsby": Houlsby(),
    "adaptformer": AdaptFormer(),
    "convpass": Convpass(),
    "mosa": MoSA(),
    "repadapter": RepAdapter(),
    "earth_adapter": EarthAdapter(),
    "vpt": VPT(),
    "vpt_shallow": VPTShallow(),
}
USABLE = {
    #            houlsby adaptformer convpass mosa repadapter earth vpt vpt_shallow
    "vit": (4, 2, 4, 2, 4, 2, 2, 1),
    "registers": (4, 2, 4, 2, 4, 2, 2, 1),
    "deit3": (4, 2, 4, 2, 4, 2, 2, 1),
    # BEiT uses the weight of qkv without calling it; position biases, rotary angles and windows fix the number of
    # tokens.
    "beit": (4, 2, 4, 2, 2, 2, 0, 0),
    "eva02": (4, 2, 4, 2, 2, 2, 0, 0),
    "swin": (8, 4, 8, 4, 8, 4, 0, 0),
    "swinv2": (8, 4, 8, 4, 4, 4, 0, 0),
    # No residual branches.
    "convnext": (0, 0, 0, 0, 4, 4, 0, 0),
}
CASES = [(m, k, n) for m, counts in USABLE.items() for k, n in zip(METHODS, counts, strict=True)]


@functools.cache
def model_of(name: str) -> tuple[nn.Module, Catalog]:
    architecture, sizes = MODELS[name]
    torch.manual_seed(0)
    model = timm.create_model(architecture, pretrained=False, num_classes=3, **sizes).eval()
    with torch.no_grad():
        for p in model.parameters():
            # Swin v2 starts with branches that add nothing, as their norms are zero.
            if p.ndim == 1:
                p.add_(0.2 * torch.randn_like(p))
    return model, scan(model)


def images(name: str) -> torch.Tensor:
    size = MODELS[name][1].get("img_size", 32)
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def usable(catalog: Catalog, method: Method) -> list[Site]:
    return [s for s in catalog.offered() if places_of(catalog, method, s)]


def plan(catalog: Catalog, sites: list[Site], method: Method) -> Allocation:
    options = []
    for site in sites:
        size = method.sizes(site)[min(1, len(method.sizes(site)) - 1)]
        options.append(Option(site.name, "m", size, method.cost(site, size), 0.0, places_of(catalog, method, site)))
    return Allocation(tuple(options), Budget(10**9))


@pytest.mark.parametrize(("name", "key", "count"), CASES)
def test_runs_where_it_can(name: str, key: str, count: int) -> None:
    model, catalog = model_of(name)
    method = METHODS[key]
    sites = usable(catalog, method)
    assert len(sites) == count
    if not sites:
        return
    x = images(name)
    with torch.no_grad():
        plain = model(x)
    with Native().insert(model, catalog, plan(catalog, sites, method), {"m": method}) as inserted:
        inserted.train_mode()
        torch.manual_seed(2)
        parameters = [p for group in inserted.groups().values() for p in group]
        with torch.no_grad():
            for p in parameters:
                p.add_(0.1 * torch.randn_like(p))
        y = inserted.model(x)
        y.square().mean().backward()
        assert y.isfinite().all()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in parameters)
        for adapter in inserted.named_adapters().values():
            assert any(bool(p.grad.any()) for p in adapter.parameters())
        # Biases of widths and channels alone would hardly move anything; the whole change must show.
        assert (y.detach() - plain).abs().max() > 1e-3
    with torch.no_grad():
        assert torch.equal(model(x), plain)


@pytest.mark.parametrize("name", ["beit", "eva02"])
def test_prompts_are_refused_when_inserted(name: str) -> None:
    """Also a plan that was made for another catalogue meets a clear error, not one of a tensor's shape."""
    model, catalog = model_of(name)
    block = next(s for s in catalog if s.kind == "block")
    willing = Site("b", "b", "block", block.shape, False, 0, "block", ("output", "tokens"))
    option = Option(block.name, "m", 5, VPT().cost(willing, 5), 0.0, catalog.places(block, ("tokens",)))
    with (
        pytest.raises(UsageError, match=f"cannot be used on {block.name}"),
        Native().insert(model, catalog, Allocation((option,), Budget(10**9)), {"m": VPT()}),
    ):
        pass


def test_adapters_of_patches_are_told_of_prompts() -> None:
    """4 patches, a class token and 5 prompts are not 3 x 3 patches with a prefix of 1."""
    model, catalog = model_of("vit")
    prompts, bypass, earth = VPT(), Convpass(dropout=0.0), EarthAdapter()
    choices = [
        ("blocks.0", "vpt", prompts, 5),
        ("blocks.0.mlp", "convpass", bypass, 4),
        ("blocks.0", "earth", earth, 4),
    ]
    options = tuple(
        Option(site, key, size, method.cost(catalog[site], size), 0.0, places_of(catalog, method, catalog[site]))
        for site, key, method, size in choices
    )
    methods = {key: method for _, key, method, _ in choices}
    with Native().insert(model, catalog, Allocation(options, Budget(10**9)), methods) as inserted:
        grids: list[tuple[int, ...]] = []
        adapters = inserted.named_adapters()
        for key, name in (("blocks.0.mlp/convpass", "_convolve"), ("blocks.0/earth", "_mixture")):
            inner = getattr(adapters[key], name)
            setattr(adapters[key], name, lambda maps, inner=inner: grids.append(tuple(maps.shape[1:3])) or inner(maps))
        inserted.model(images("vit"))
    # The last one holds class token and prompts, one by one.
    assert grids == [(2, 2), (2, 2), (1, 1)]


@pytest.mark.parametrize("key", METHODS)
@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision(key: str, autocast: bool) -> None:
    """Under autocast and on a model in bfloat16, with parameters in float32."""
    model, catalog = model_of("registers")
    method = METHODS[key]
    sites = usable(catalog, method)
    x = images("registers")
    if not autocast:
        model, x = copy.deepcopy(model).bfloat16(), x.bfloat16()
    with Native().insert(model, catalog, plan(catalog, sites, method), {"m": method}) as inserted:
        inserted.train_mode()
        adapters = [p for a in inserted.named_adapters().values() for p in a.parameters()]
        with torch.no_grad():
            for p in adapters:
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = inserted.model(x)
        y.float().square().mean().backward()
        assert y.dtype == torch.bfloat16
        assert y.isfinite().all()
        for p in adapters:
            assert p.dtype == p.grad.dtype == torch.float32
            assert p.grad.isfinite().all()
