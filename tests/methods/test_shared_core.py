from __future__ import annotations

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
from autopeft.core.scores import Evidence, TensorEvidence
from autopeft.core.site import Catalog, Site
from autopeft.methods.core import Core
from autopeft.methods.shared_core import SharedCore
from autopeft.models.scan import scan
from autopeft.testing.method_laws import MethodLaws
from autopeft.testing.tiny import tiny_vit


class TestLaws(MethodLaws):
    def make(self) -> Method:
        return SharedCore()


def group(catalog: Catalog, name: str) -> Site:
    return next(g for g in catalog.groups() if g.name == name)


def inserted(model: nn.Module, name: str, size: int):  # type: ignore[no-untyped-def]  # a context manager
    catalog, method = scan(model), SharedCore()
    site = group(catalog, name)
    option = Option(name, "m", size, method.cost(site, size), 0.0, places_of(catalog, method, site))
    return Native().insert(model, catalog, Allocation((option,), Budget(10**6)), {"m": method})


def test_each_layer_is_changed_in_its_own_bases() -> None:
    """With M = diag(3, 1) every layer gains 3 u_1 v_1^T + u_2 v_2^T of its own singular vectors."""
    model = tiny_vit().double()
    with inserted(model, "*:mlp.fc1", 2) as borrowed:
        part = borrowed.named_adapters()["*:mlp.fc1/m"]
        assert {n: tuple(t.shape) for n, t in part.state_dict().items()} == {"M": (2, 2)}
        with torch.no_grad():
            part.M.copy_(torch.diag(torch.tensor([3.0, 1.0])))
        for block, adapter in enumerate(part.adapters()):
            weight = model.blocks[block].mlp.fc1.weight.detach()
            u, _, vh = torch.linalg.svd(weight, full_matrices=False)
            oracle = 3 * torch.outer(u[:, 0], vh[0]) + torch.outer(u[:, 1], vh[1])
            torch.testing.assert_close(adapter.delta()["weight"], oracle, atol=1e-6, rtol=1e-5)
            down, up = adapter.low_rank()
            torch.testing.assert_close(up @ down, adapter.delta()["weight"])


def test_the_price_is_that_of_one_core() -> None:
    with torch.device("meta"):
        catalog = scan(timm.create_model("vit_base_patch16_224", num_classes=10))
    site = group(catalog, "*:attn.qkv")
    assert SharedCore().cost(site, 16).trainable == 256
    assert sum(Core().cost(m, 16).trainable for m in site.members) == 12 * 256
    assert SharedCore().cost(site, 16).entries == 12 * 2304 * 768


def test_gains_are_the_energy_of_the_gradient_of_the_core() -> None:
    """The gradient of M by autograd, through two layers; M's entries move both, so its unit is sqrt(2) long."""
    model = tiny_vit().double().requires_grad_(True)
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    model(x).square().sum().backward()
    site = group(scan(model), "*:attn.proj")
    known = {}
    for member in site.members:
        weight = model.get_submodule(member.module).weight
        known[member.name] = Evidence(
            member, {"weight": TensorEvidence(weight.detach(), weight.grad.clone(), weight.grad.square())}
        )
    gains = SharedCore().gains(site, Evidence(site, {}, known), (1, 3, 16))
    total = sum(float(k["weight"].signal.square().sum()) for k in known.values())
    assert gains[-1] <= total
    for size, gain in zip((1, 3, 16), gains, strict=True):
        with inserted(model, "*:attn.proj", size) as borrowed:
            borrowed.model(x).square().sum().backward()
            (m,) = borrowed.groups()["m"]
            assert gain == pytest.approx(float(m.grad.square().sum()) / 2, rel=1e-4)


def test_where_it_can_be_used() -> None:
    catalog = scan(tiny_vit())
    used = [s.name for s in (*catalog, *catalog.groups()) if SharedCore().slots(s)]
    assert used == ["*:attn.qkv", "*:attn.proj", "*:mlp.fc1", "*:mlp.fc2"]
    assert SharedCore().sizes(group(catalog, "*:mlp.fc1"))[-1] == 16


def test_scales_cost_one_scalar_per_layer_and_start_at_the_plain_core() -> None:
    model = tiny_vit().double()
    catalog, method = scan(model), SharedCore(scales=True)
    site = group(catalog, "*:mlp.fc1")
    members = len(method.members(site))
    assert method.cost(site, 3).trainable == 9 + members
    option = Option(site.name, "m", 3, method.cost(site, 3), 0.0, places_of(catalog, method, site))
    with Native().insert(model, catalog, Allocation((option,), Budget(10**6)), {"m": method}) as borrowed:
        part = borrowed.named_adapters()["*:mlp.fc1/m"]
        assert part.scales.tolist() == [1.0] * members
        with torch.no_grad():
            part.M.normal_()
        before = [adapter.delta()["weight"].clone() for adapter in part.adapters()]
        with torch.no_grad():
            part.scales.copy_(torch.arange(members) - 1.0)
        for number, adapter in enumerate(part.adapters()):
            torch.testing.assert_close(adapter.delta()["weight"], (number - 1.0) * before[number])
