from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from autopeft.core.contracts import Method
from autopeft.core.scores import Evidence, TensorEvidence
from autopeft.core.site import Site
from autopeft.errors import UsageError
from autopeft.methods.earth_adapter import EarthAdapter
from autopeft.testing.method_laws import MethodLaws


class TestLaws(MethodLaws):
    models = ("vit",)
    identity = False

    def make(self) -> Method:
        return EarthAdapter(rho=1.0, fft_layers=(), start="random", prefix=1)


def block(channels: int = 6, depth: int = 0, axis: int = -1) -> Site:
    return Site("b", "b", "block", (channels,), False, depth, "block", ("output",), channel_axis=axis)


def disturbed(build, method: EarthAdapter, site: Site) -> nn.Module:
    adapter = build(method, site, nn.Linear(6, 6).double(), 2)
    for p in adapter.parameters():
        nn.init.normal_(p)
    return adapter


def by_definition(adapter: nn.Module, maps: Tensor, reach: int) -> Tensor:
    """The mixture with torch's Fourier transform and layers; maps (B, s, s, C)."""
    frequency = torch.fft.fftfreq(maps.shape[1], 1 / maps.shape[1]).round().abs() <= reach
    kept = torch.fft.fft2(maps, dim=(1, 2), norm="ortho") * (frequency[:, None] & frequency)[..., None]
    low = torch.fft.ifft2(kept, dim=(1, 2), norm="ortho").real
    shares = torch.softmax(maps @ adapter.router_weight.T + adapter.router_bias, -1)
    total = torch.zeros_like(maps)
    for i, x in enumerate((maps, low, maps - low)):
        hidden = torch.relu(x @ adapter.down_weight[i].T + adapter.down_bias[i])
        total = total + shares[..., i : i + 1] * (hidden @ adapter.up_weight[i].T + adapter.up_bias[i])
    return adapter.alpha * total


@pytest.mark.parametrize(("side", "rho", "reach"), [(7, 0.3, 1), (8, 0.5, 2), (4, 0.2, 0)])
def test_mixture_against_the_definition(build, side: int, rho: float, reach: int) -> None:
    adapter = disturbed(build, EarthAdapter(rho=rho, others="unchanged"), block())
    y = torch.randn(2, 1 + side * side, 6, dtype=torch.float64)
    change = by_definition(adapter, y[:, 1:].reshape(2, side, side, 6), reach)
    found = adapter.transform(y)
    assert torch.equal(found[:, 0], y[:, 0])
    torch.testing.assert_close(found[:, 1:], y[:, 1:] + change.flatten(1, 2))


def test_class_tokens_are_maps_of_one_patch(build) -> None:
    adapter = disturbed(build, EarthAdapter(), block())
    y = torch.randn(2, 2 + 9, 6, dtype=torch.float64)
    found = adapter.transform(y)
    patches = by_definition(adapter, y[:, 2:].reshape(2, 3, 3, 6), 0).flatten(1, 2)
    torch.testing.assert_close(found[:, 2:], y[:, 2:] + patches)
    for i in range(2):
        change = by_definition(adapter, y[:, i].reshape(2, 1, 1, 6), 0)
        torch.testing.assert_close(found[:, i], y[:, i] + change.flatten(1))


def test_maps_with_channels_first(build) -> None:
    adapter = disturbed(build, EarthAdapter(), block(axis=1))
    y = torch.randn(2, 6, 8, 8, dtype=torch.float64)
    change = by_definition(adapter, y.permute(0, 2, 3, 1), 1)
    torch.testing.assert_close(adapter.transform(y), y + change.permute(0, 3, 1, 2))


def test_other_blocks_have_the_spatial_adapter_alone(build) -> None:
    method = EarthAdapter(fft_layers=(1, 2), alpha=0.5, others="unchanged")
    assert [method.mixes(block(depth=d)) for d in range(4)] == [False, True, True, False]
    adapter = build(method, block(channels=2), nn.Linear(2, 2), 1)
    assert set(adapter.state_dict()) == {"down_weight", "down_bias", "up_weight", "up_bias", "alpha"}
    with torch.no_grad():
        adapter.down_weight.copy_(torch.tensor([[[1.0, 1.0]]]))
        adapter.up_weight.copy_(torch.tensor([[[2.0], [4.0]]]))
    y = torch.tensor([[[9.0, 9.0], [1.0, 2.0], [0.0, -1.0], [0.0, 0.0], [2.0, 0.0]]])
    # Half of (2, 4) times the positive sums 3 and 2 of the patches; the class token stays.
    assert adapter.transform(y).tolist() == [[[9, 9], [4, 8], [0, -1], [0, 0], [4, 4]]]


def test_starts(build) -> None:
    y = torch.randn(2, 5, 6, dtype=torch.float64)
    host = nn.Linear(6, 6).double()
    assert torch.equal(build(EarthAdapter(), block(), host, 2).transform(y), y)
    released = build(EarthAdapter(start="random"), block(), host, 2)
    assert float(released.alpha.detach()) == pytest.approx(0.1)
    assert 0 < (released.transform(y) - y).detach().abs().max() < 0.5


def test_gains() -> None:
    site = block(channels=4)
    matrix = torch.diag(torch.tensor([2.0, 4, 6, 8]))
    known = Evidence(site, {"output": TensorEvidence(torch.empty(0), matrix, matrix.square())})
    assert EarthAdapter().gains(site, known, (1, 2)) == ((64 + 36 + 16) / 4, (64 + 36 + 16 + 4) / 4)
    assert EarthAdapter(fft_layers=()).gains(site, known, (1, 2)) == (16.0, 25.0)


def test_published_count() -> None:
    """24 layers of a ViT-L, width 64."""
    sites = [block(channels=1024, depth=d) for d in range(24)]
    assert sum(EarthAdapter().cost(s, 64).trainable for s in sites) == 9_589_344
    some = EarthAdapter(fft_layers=(0, 1, 2, 3, 4, 5))
    spatial = 2 * 1024 * 64 + 64 + 1024
    assert sum(some.cost(s, 64).trainable for s in sites) == 24 * (spatial + 1) + 6 * (2 * spatial + 3 * 1024 + 3)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"rho": 0.0}, "rho"),
        ({"rho": 1.5}, "rho"),
        ({"fft_layers": (0, -1)}, "fft_layers"),
        ({"alpha": 0.0}, "scale"),
        ({"prefix": -2}, "prefix"),
    ],
)
def test_bad_fields(fields: dict, name: str) -> None:
    with pytest.raises(UsageError, match=f"earth_adapter: {name}"):
        EarthAdapter(**fields)
