"""Bias, vector, norm and tokens: dense changes of small tensors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from autopeft.core.scores import Evidence, TensorEvidence
from autopeft.core.site import Site
from autopeft.methods.bias import Bias
from autopeft.methods.norm import Norm
from autopeft.methods.tokens import Tokens
from autopeft.methods.vector import Vector

TOKENS = Site("cls_token", "", "tokens", (1, 1, 4), False, 0, "tokens", ("tokens",), parameter="cls_token")
SCALE = Site("ls1", "ls1", "layer_scale", (4,), False, 0, "layer_scale", ("weight",), parameter="gamma")


def test_where_they_go(site_of) -> None:
    linear, bare, norm = site_of(nn.Linear(4, 4)), site_of(nn.Linear(4, 4, bias=False)), site_of(nn.LayerNorm(4))
    where = {
        method: [method.slots(site) for site in (linear, bare, norm, TOKENS, SCALE)]
        for method in (Bias(), Vector(), Norm(), Tokens())
    }
    assert where == {
        Bias(): [("bias",), (), ("bias",), (), ()],
        Vector(): [(), (), ("weight",), (), ("weight",)],
        Norm(): [(), (), ("weight", "bias"), (), ()],
        Tokens(): [(), (), (), ("tokens",), ()],
    }


def test_norm_without_bias_is_left_to_vector(site_of) -> None:
    site = site_of(nn.LayerNorm(4, bias=False))
    assert Norm().sizes(site) == ()
    assert Vector().sizes(site) == (1,)


def test_bias_adds_along_the_channels(site_of, build) -> None:
    host = nn.Conv2d(3, 4, 1)
    adapter = build(Bias(), site_of(host), host, 1)
    with torch.no_grad():
        adapter.bias.copy_(torch.arange(4.0))
    x = torch.randn(2, 3, 5, 6)
    gap = host(x) + adapter.branch(x) - host(x)
    torch.testing.assert_close(gap[1, :, 2, 3], torch.arange(4.0))


def test_bias_of_a_slice_is_the_slice_of_the_bias(site_of, build) -> None:
    host = nn.Linear(3, 9)
    assert build(Bias(), site_of(host, (3, 6)), host, 1).bias.shape == (3,)


def test_norm_changes_both(site_of, build) -> None:
    host = nn.BatchNorm2d(4)
    adapter = build(Norm(), site_of(host), host, 1)
    assert adapter.form == "swap"
    with torch.no_grad():
        adapter.get_parameter("weight").fill_(2.0)
        adapter.get_parameter("bias").fill_(3.0)
    merged = adapter.merge({"weight": host.weight, "bias": host.bias})
    assert merged["weight"].tolist() == [3.0] * 4
    assert merged["bias"].tolist() == [3.0] * 4


def test_tokens_of_a_holder(build) -> None:
    holder = nn.Module()
    holder.cls_token = nn.Parameter(torch.ones(1, 1, 4))
    adapter = build(Tokens(), TOKENS, holder, 1)
    assert adapter.get_parameter("tokens").shape == (1, 1, 4)
    merged = adapter.merge({"tokens": holder.cls_token})
    assert torch.equal(merged["tokens"], holder.cls_token)


@pytest.mark.parametrize(
    ("method", "slots", "gain"),
    [(Bias(), ("bias",), 5.0), (Vector(), ("weight",), 25.0), (Norm(), ("weight", "bias"), 30.0)],
)
def test_gains_are_energies(site_of, method, slots: tuple[str, ...], gain: float) -> None:
    site = site_of(nn.LayerNorm(2))
    signals = {"weight": torch.tensor([3.0, -4.0]), "bias": torch.tensor([1.0, 2.0])}
    known = Evidence(site, {s: TensorEvidence(torch.ones(2), g, g.square()) for s, g in signals.items()})
    assert method.slots(site) == slots
    assert method.gains(site, known, (1,)) == (pytest.approx(gain),)
