from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from autopeft.core.contracts import Method
from autopeft.core.scores import Evidence, TensorEvidence
from autopeft.core.site import Site
from autopeft.errors import UsageError
from autopeft.methods.houlsby import Houlsby
from autopeft.models.scan import scan
from autopeft.testing.method_laws import MethodLaws


class TestLaws(MethodLaws):
    models = ("vit",)
    identity = False

    def make(self) -> Method:
        return Houlsby(activation="quick_gelu", spread=0.2)


def residual(role: str = "mlp", channels: int = 8, axis: int = -1) -> Site:
    return Site("b.x", "b.x", "residual", (channels,), False, 0, role, ("output",), channel_axis=axis)


def test_hand_worked(build) -> None:
    adapter = build(Houlsby(activation="relu"), residual(channels=2), nn.Linear(2, 2), 1)
    with torch.no_grad():
        adapter.down_weight.copy_(torch.tensor([[1.0, -2.0]]))
        adapter.down_bias.fill_(1.0)
        adapter.up_weight.copy_(torch.tensor([[2.0], [3.0]]))
        adapter.up_bias.copy_(torch.tensor([0.5, 0.0]))
    # relu(1 * 4 - 2 * 1 + 1) = 3; relu(1 * 1 - 2 * 4 + 1) = 0
    y = torch.tensor([[4.0, 1.0], [1.0, 4.0]])
    assert adapter.transform(y).tolist() == [[4 + 6 + 0.5, 1 + 9.0], [1.5, 4.0]]


@pytest.mark.parametrize("name", ["relu", "gelu", "quick_gelu"])
def test_activations(build, name: str) -> None:
    adapter = build(Houlsby(activation=name), residual(axis=1), nn.Linear(8, 8).double(), 4)
    nn.init.normal_(adapter.up_weight)
    act = {"relu": nn.ReLU(), "gelu": nn.GELU(), "quick_gelu": lambda z: z * torch.sigmoid(1.702 * z)}[name]
    y = torch.randn(2, 8, 3, 3, dtype=torch.float64)
    last = y.permute(0, 2, 3, 1)
    oracle = last + act(last @ adapter.down_weight.T) @ adapter.up_weight.T
    torch.testing.assert_close(adapter.transform(y), oracle.permute(0, 3, 1, 2))


def test_near_identity_as_in_the_paper(build) -> None:
    adapter = build(Houlsby(spread=0.01), residual(channels=256), nn.Linear(256, 256), 128)
    for weight in (adapter.down_weight, adapter.up_weight):
        assert 0 < weight.abs().max() <= 0.02
        # A normal distribution cut off at two deviations keeps 0.88 of its deviation.
        assert weight.detach().std() == pytest.approx(0.0088, rel=0.03)
    y = torch.randn(3, 256)
    assert 0 < (adapter.transform(y) - y).abs().max() < 0.05


def test_gains() -> None:
    site = residual(channels=4)
    assert Houlsby().gains(site, Evidence(site, {}), (1, 2)) == (0.0, 0.0)
    matrix = torch.diag(torch.tensor([1.0, 4, 2, 0]))
    known = Evidence(site, {"output": TensorEvidence(torch.empty(0), matrix, matrix.square())})
    assert Houlsby().gains(site, known, (1, 2)) == (4.0, 5.0)


def test_nothing_but_residual_branches(site_of) -> None:
    assert not Houlsby().slots(site_of(nn.Linear(8, 8)))
    assert not Houlsby().slots(Site("b", "b", "block", (8,), False, 0, "block", ("output",)))
    assert Houlsby().sizes(residual(channels=768))[-1] == 256
    assert not Houlsby().mergeable(residual())


@pytest.mark.parametrize("spread", [-0.1, float("nan"), float("inf")])
def test_bad_spread(spread: float) -> None:
    with pytest.raises(UsageError, match="spread"):
        Houlsby(spread=spread)


def test_count_on_a_vit_b() -> None:
    with torch.device("meta"):
        catalog = scan(timm.create_model("vit_base_patch16_224", num_classes=10))
    costs = {s.name: Houlsby().cost(s, 64).trainable for s in catalog if Houlsby().slots(s)}
    assert sum(n for name, n in costs.items() if name.endswith("mlp")) == 1_189_632
    assert sum(costs.values()) == 2 * 1_189_632
