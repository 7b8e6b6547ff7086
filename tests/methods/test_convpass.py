from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn

from autopeft.core.contracts import Method
from autopeft.core.scores import Evidence, TensorEvidence
from autopeft.core.site import Site
from autopeft.errors import UsageError
from autopeft.methods.convpass import Convpass
from autopeft.models.scan import scan
from autopeft.testing.method_laws import MethodLaws

SITE = Site("b.attn", "b.attn", "residual", (8,), False, 0, "attn", ("output",))


class TestLaws(MethodLaws):
    models = ("vit",)

    def make(self) -> Method:
        return Convpass(scale=10.0, prefix=1, dropout=0.0)


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def disturbed(build, method: Convpass, site: Site = SITE, size: int = 3) -> nn.Module:
    adapter = build(method, site, nn.Linear(8, 8).double(), size).eval()
    for p in adapter.parameters():
        nn.init.normal_(p)
    return adapter


@pytest.mark.parametrize(("prefix", "side"), [(0, 3), (1, 4), (5, 2)])
def test_against_layers(build, prefix: int, side: int) -> None:
    """The bypass with torch's own layers: the patches as one map, every other token as a map of its own."""
    adapter = disturbed(build, Convpass(scale=0.7, prefix=prefix))
    down, up, conv = nn.Linear(8, 3).double(), nn.Linear(3, 8).double(), nn.Conv2d(3, 3, 3, padding=1).double()
    for layer, name in ((down, "down"), (up, "up"), (conv, "conv")):
        parts = {"weight": getattr(adapter, f"{name}_weight"), "bias": getattr(adapter, f"{name}_bias")}
        layer.load_state_dict(parts)
    x = torch.randn(2, prefix + side * side, 8, dtype=torch.float64)
    hidden = quick_gelu(down(x))
    patches = conv(hidden[:, prefix:].transpose(1, 2).reshape(2, 3, side, side)).flatten(2).transpose(1, 2)
    others = [conv(hidden[:, i].reshape(2, 3, 1, 1)).flatten(2).transpose(1, 2) for i in range(prefix)]
    oracle = 0.7 * up(quick_gelu(torch.cat((*others, patches), 1)))
    torch.testing.assert_close(adapter.branch(x), oracle)


def test_convolution_starts_as_the_identity(build) -> None:
    adapter = build(Convpass(), SITE, nn.Linear(8, 8).double(), 2).eval()
    nn.init.normal_(adapter.up_weight)
    x = torch.randn(2, 10, 8, dtype=torch.float64)
    oracle = quick_gelu(quick_gelu(x @ adapter.down_weight.T)) @ adapter.up_weight.T
    torch.testing.assert_close(adapter.branch(x), oracle)


def test_maps_of_both_layouts(build) -> None:
    adapter = disturbed(build, Convpass())
    tokens = torch.randn(2, 9, 8, dtype=torch.float64)
    oracle = adapter.branch(tokens).reshape(2, 3, 3, 8)
    torch.testing.assert_close(adapter.branch(tokens.reshape(2, 3, 3, 8)), oracle)
    first = Site("b.attn", "b.attn", "residual", (8,), False, 0, "attn", ("output",), channel_axis=1)
    adapter.site = first
    torch.testing.assert_close(
        adapter.branch(tokens.reshape(2, 3, 3, 8).permute(0, 3, 1, 2)), oracle.permute(0, 3, 1, 2)
    )


def test_rectangles_are_refused(build) -> None:
    adapter = build(Convpass(), SITE, nn.Linear(8, 8), 2)
    with pytest.raises(UsageError, match=r"b\.attn is given 193 tokens"):
        adapter.branch(torch.randn(1, 16 * 12 + 1, 8))


def test_gains() -> None:
    matrix = torch.diag(torch.tensor([2.0, 4, 0, 0, 0, 0, 0, 0]))
    known = Evidence(SITE, {"output": TensorEvidence(torch.empty(0), matrix, matrix.square())})
    assert Convpass().gains(SITE, known, (1, 2)) == (4.0, 5.0)


@pytest.mark.parametrize(
    ("fields", "name"), [({"scale": -1.0}, "scale"), ({"dropout": -0.1}, "dropout"), ({"prefix": -1}, "prefix")]
)
def test_bad_fields(fields: dict, name: str) -> None:
    with pytest.raises(UsageError, match=f"convpass: {name}"):
        Convpass(**fields)


def test_count_on_a_vit_b() -> None:
    with torch.device("meta"):
        catalog = scan(timm.create_model("vit_base_patch16_224", num_classes=10))
    assert sum(Convpass().cost(s, 8).trainable for s in catalog if Convpass().slots(s)) == 327_552
