from __future__ import annotations

import dataclasses

import pytest
import timm
import torch
from torch import nn

from autopeft.core.contracts import Method
from autopeft.core.site import Site
from autopeft.errors import UsageError
from autopeft.methods.repadapter import RepAdapter
from autopeft.models.scan import scan
from autopeft.testing.method_laws import MethodLaws


class TestLaws(MethodLaws):
    models = ("vit",)

    def make(self) -> Method:
        return RepAdapter(scale=5.0, groups=3, roles=("attn.proj", "mlp.fc2"))


def fc1(site_of, host: nn.Linear) -> Site:
    return dataclasses.replace(site_of(host), role="mlp.fc1")


@pytest.mark.parametrize(("groups", "size"), [(2, 4), (2, 6), (1, 3), (4, 8), (2, 5), (3, 4), (2, 1)])
def test_merge_is_exact(site_of, build, groups: int, size: int) -> None:
    host = nn.Linear(32, 7).double()
    method = RepAdapter(scale=0.5, groups=groups)
    adapter = build(method, fc1(site_of, host), host, size)
    x = torch.randn(5, 3, 32, dtype=torch.float64)
    assert torch.equal(adapter.receive(x), x)
    for p in adapter.parameters():
        nn.init.normal_(p)
    merged = adapter.merge({"weight": host.weight, "bias": host.bias})
    torch.testing.assert_close(torch.func.functional_call(host, merged, (x,)), host(adapter.receive(x)))
    assert sum(p.numel() for p in adapter.parameters()) == method.cost(adapter.site, size).trainable


def test_against_a_grouped_convolution(site_of, build) -> None:
    """As the paper has it: a 1x1 convolution down, one in two groups up, along the tokens."""
    host = nn.Linear(8, 8).double()
    adapter = build(RepAdapter(scale=2.0), fc1(site_of, host), host, 4)
    for p in adapter.parameters():
        nn.init.normal_(p)
    down, up = nn.Conv1d(8, 4, 1).double(), nn.Conv1d(4, 8, 1, groups=2).double()
    down.load_state_dict({"weight": adapter.down_weight[..., None], "bias": adapter.down_bias})
    up.load_state_dict({"weight": adapter.up_weight[..., None], "bias": adapter.up_bias})
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    oracle = x + 2.0 * up(down(x.transpose(1, 2))).transpose(1, 2)
    torch.testing.assert_close(adapter.receive(x), oracle)


@pytest.mark.parametrize(
    ("width", "groups", "starts"), [(4, 2, [0, 2]), (3, 2, [0, 1]), (1, 2, [0, 0]), (7, 3, [0, 2, 4])]
)
def test_parts_cover_the_hidden_values(site_of, build, width: int, groups: int, starts: list[int]) -> None:
    host = nn.Linear(32, 4)
    adapter = build(RepAdapter(groups=groups), fc1(site_of, host), host, width)
    assert adapter._starts() == starts


@pytest.mark.parametrize("bias", [True, False])
def test_gains_are_the_energy_of_the_gradient_at_the_best_start(site_of, build, evidence_of, bias: bool) -> None:
    host = nn.Linear(10, 14, bias=bias).double()
    site = fc1(site_of, host)
    x, pull = torch.randn(30, 10, dtype=torch.float64), torch.randn(30, 14, dtype=torch.float64)
    (host(x) * pull).sum().backward()
    tensors = dict(host.named_parameters())
    known = evidence_of(
        site, {n: p.detach() for n, p in tensors.items()}, {n: p.grad.clone() for n, p in tensors.items()}
    )
    adapter = build(RepAdapter(), site, host, 4)
    gradient = host.weight.detach().T @ host.weight.grad.clone()
    with torch.no_grad():
        for i, rows in enumerate(gradient.chunk(2)):
            adapter.down_weight[2 * i : 2 * i + 2] = torch.linalg.svd(rows).Vh[:2]
    (host(adapter.receive(x)) * pull).sum().backward()
    energy = float(adapter.up_weight.grad.square().sum())
    if bias:
        energy += float(adapter.up_bias.grad.square().sum())
    assert RepAdapter().gains(site, known, (4,))[0] == pytest.approx(energy)


def test_where_it_goes(site_of) -> None:
    host = nn.Linear(12, 36)
    site = site_of(host)
    assert RepAdapter().slots(dataclasses.replace(site, role="attn.qkv")) == ("weight", "bias")
    assert not RepAdapter().slots(dataclasses.replace(site, role="attn.proj"))
    assert not RepAdapter().slots(dataclasses.replace(site_of(host, (0, 12)), role="attn.qkv"))
    assert not RepAdapter().slots(dataclasses.replace(site_of(nn.Conv2d(12, 4, 1)), role="attn.qkv"))
    assert RepAdapter().sizes(dataclasses.replace(site, role="attn.qkv")) == (2, 4)
    assert not RepAdapter(groups=8).sizes(dataclasses.replace(site, role="attn.qkv"))


def test_no_bias_cannot_be_merged(site_of, build) -> None:
    host = nn.Linear(8, 4, bias=False)
    site = fc1(site_of, host)
    adapter = build(RepAdapter(), site, host, 2)
    assert not RepAdapter().mergeable(site)
    assert "no bias" in adapter.obstacle
    assert adapter.slots == RepAdapter().slots(site) == ("weight",)


def test_unusual_linear_cannot_be_merged(site_of, build) -> None:
    class Cosine(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x / x.norm())

    host = Cosine(8, 4)
    assert "Cosine" in build(RepAdapter(), fc1(site_of, host), host, 2).obstacle


@pytest.mark.parametrize(
    ("fields", "name"),
    [({"scale": 0.0}, "scale"), ({"groups": 0}, "groups"), ({"roles": ()}, "roles"), ({"dropout": 2.0}, "dropout")],
)
def test_bad_fields(fields: dict, name: str) -> None:
    with pytest.raises(UsageError, match=f"repadapter: {name}"):
        RepAdapter(**fields)


def test_count_on_a_vit_b() -> None:
    with torch.device("meta"):
        catalog = scan(timm.create_model("vit_base_patch16_224", num_classes=10))
    assert sum(RepAdapter().cost(s, 8).trainable for s in catalog if RepAdapter().slots(s)) == 239_808
