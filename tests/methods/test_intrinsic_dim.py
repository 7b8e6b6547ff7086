from __future__ import annotations

import pytest
import timm
import torch

from autopeft.backends.native import Native
from autopeft.core.allocation import Allocation
from autopeft.core.budget import Budget
from autopeft.core.contracts import Method
from autopeft.core.menu import Option
from autopeft.core.places import places_of
from autopeft.core.scores import Evidence, TensorEvidence
from autopeft.core.site import Catalog, Site
from autopeft.errors import UsageError
from autopeft.methods.intrinsic_dim import IntrinsicDim, IntrinsicDimShared
from autopeft.models.scan import scan
from autopeft.testing.method_laws import MethodLaws
from autopeft.testing.tiny import tiny_convnet, tiny_vit


class TestFastfood(MethodLaws):
    def make(self) -> Method:
        return IntrinsicDim()


class TestSparsePerRole(MethodLaws):
    def make(self) -> Method:
        return IntrinsicDim(projection="sparse", scope="role")


class TestDensePerRole(MethodLaws):
    dtypes = (torch.float32,)

    def make(self) -> Method:
        return IntrinsicDim(projection="dense", scope="role")


def group(catalog: Catalog, name: str = "*") -> Site:
    return next(g for g in catalog.groups() if g.name == name)


def built(method: IntrinsicDim, size: int, name: str = "*") -> IntrinsicDimShared:
    model = tiny_vit().double()
    site = group(scan(model), name)
    option = Option(name, "m", size, method.cost(site, size), 0.0, places_of(scan(model), method, site))
    return method.build(site, option, model, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("projection", ["fastfood", "dense", "sparse"])
def test_all_weights_move_along_unit_directions(projection: str) -> None:
    """What moves is linear in z, over all weights together, along columns of about unit norm."""
    part = built(IntrinsicDim(projection=projection), 5)  # type: ignore[arg-type]

    def change(z: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            part.z.copy_(z)
        return torch.cat([a.delta()["weight"].detach().flatten() for a in part.adapters()])

    columns = torch.stack([change(e) for e in torch.eye(5, dtype=torch.float64)], dim=1)
    assert len(columns) == sum(a.site.n_weight for a in part.adapters()) == 6912
    torch.testing.assert_close(columns.square().sum(0), torch.ones(5, dtype=torch.float64), atol=0.2, rtol=0)
    z = torch.randn(5, dtype=torch.float64)
    torch.testing.assert_close(change(z), columns @ z)
    assert next(iter(part.adapters())).site.name == "patch_embed.proj"


def test_what_is_stored_is_z_and_a_seed() -> None:
    part = built(IntrinsicDim(), 12)
    stored = part.stored()
    assert {n: (tuple(t.shape), t.dtype) for n, t in stored.items()} == {
        "z": ((12,), torch.float64),
        "seed": ((1,), torch.int64),
    }
    cost = IntrinsicDim().cost(part.site, 12)
    assert (cost.trainable, cost.stored, cost.bits, cost.entries, cost.tensors) == (12, 13, 32 * 12 + 64, 6912, 2)


def test_loading_follows_the_seed_even_after_use() -> None:
    first, second = built(IntrinsicDim(), 6), built(IntrinsicDim(), 6)
    with torch.no_grad():
        first.seed.fill_(99)
        first.z.normal_()
        second.z.copy_(first.z)
    deltas = [[a.delta()["weight"] for a in part.adapters()] for part in (first, second)]
    assert not torch.equal(deltas[0][0], deltas[1][0])
    second.load_stored(first.stored())
    for adapter, oracle in zip(second.adapters(), deltas[0], strict=True):
        torch.testing.assert_close(adapter.delta()["weight"], oracle)


def test_the_projection_is_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    part = built(IntrinsicDim(), 6)
    draws: list[int] = []
    draw = type(part.projection).draw
    monkeypatch.setattr(type(part.projection), "draw", lambda self, s, d: draws.append(s) or draw(self, s, d))
    for _ in range(2):
        for adapter in part.adapters():
            adapter.delta()
    assert draws == [int(part.seed)]
    with torch.no_grad():
        part.seed.copy_(part.seed.clone())
    part.adapters()[0].delta()
    assert len(draws) == 1


def test_first_use_in_inference_mode_does_not_spoil_training() -> None:
    part = built(IntrinsicDim(projection="dense"), 4)
    with torch.inference_mode():
        part.adapters()[0].delta()
    part.adapters()[0].delta()["weight"].sum().backward()
    assert part.z.grad is not None
    assert part.z.grad.any()


def test_one_z_moves_a_model() -> None:
    model = tiny_vit()
    catalog, method = scan(model), IntrinsicDim(scope="role")
    site = group(catalog, "*:attn.qkv")
    option = Option(site.name, "m", 8, method.cost(site, 8), 0.0, places_of(catalog, method, site))
    with Native().insert(model, catalog, Allocation((option,), Budget(10**6)), {"m": method}) as inserted:
        assert inserted.trainable_count() == 8
        inserted.model(torch.randn(2, 3, 8, 8)).square().sum().backward()
        (z,) = inserted.groups()["m"]
        assert int((z.grad != 0).sum()) == 8


def test_gains_are_the_share_of_the_directions() -> None:
    site = group(scan(tiny_vit()))
    known = {
        m.name: Evidence(m, {"weight": TensorEvidence(torch.zeros(m.shape), torch.full(m.shape, 2.0), torch.ones(1))})
        for m in site.members
    }
    gains = IntrinsicDim().gains(site, Evidence(site, {}, known), (3, 12))
    assert gains == pytest.approx((3 * 4.0, 12 * 4.0))
    del known["blocks.0.attn.qkv"]
    with pytest.raises(UsageError, match=r"nothing about blocks\.0\.attn\.qkv"):
        IntrinsicDim().gains(site, Evidence(site, {}, known), (3,))


def test_expected_energy_of_random_directions() -> None:
    """The documented expectation p / D, measured: what 8 of 6,912 directions capture of a fixed signal."""
    shares = []
    signal = torch.randn(6912, dtype=torch.float64)
    method = IntrinsicDim()
    part = built(method, 8)
    for seed in range(200):
        part.projection.draw(seed, torch.device("cpu"))
        z = torch.zeros(8, dtype=torch.float64, requires_grad=True)
        (pull,) = torch.autograd.grad((part.projection.rows(z, 0, 6912) * signal).sum(), z)
        shares.append(float(pull.square().sum() / signal.square().sum()))
    assert sum(shares) / 200 == pytest.approx(8 / 6912, rel=0.12)


def test_sizes_end_where_weights_or_memory_do() -> None:
    tiny = group(scan(tiny_vit()))
    assert IntrinsicDim().sizes(tiny)[-1] == 6912 // 4
    with torch.device("meta"):
        large = group(scan(timm.create_model("vit_base_patch16_224", num_classes=10)))
    assert IntrinsicDim().sizes(large)[-1] == 1 << 20
    assert IntrinsicDim(projection="dense").sizes(large) == (1,)
    assert IntrinsicDim(projection="sparse").sizes(large)[-1] == (1 << 27) // 9248
    assert IntrinsicDim().cost(large, 750).trainable == 750
    assert IntrinsicDim().cost(large, 750).entries == 84_934_656 + 768 * 768


def test_where_it_can_be_used() -> None:
    for model in (tiny_vit(), tiny_convnet()):
        catalog = scan(model)
        sites = (*catalog, *catalog.groups())
        assert [s.name for s in sites if IntrinsicDim().slots(s)] == ["*"]
        roles = [s.name for s in sites if IntrinsicDim(scope="role").slots(s)]
        assert roles
        assert all(name.startswith("*:") for name in roles)


@pytest.mark.parametrize("settings", [{"projection": "fourier"}, {"scope": "block"}])
def test_settings_out_of_range(settings: dict[str, str]) -> None:
    with pytest.raises(UsageError, match=next(iter(settings))):
        IntrinsicDim(**settings)  # type: ignore[arg-type]
