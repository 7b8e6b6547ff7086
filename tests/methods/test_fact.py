from __future__ import annotations

import dataclasses

import numpy as np
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
from autopeft.methods.fact import FacT, FacTShared
from autopeft.models.scan import scan
from autopeft.testing.method_laws import MethodLaws
from autopeft.testing.tiny import tiny_convnet, tiny_vit


class TestTT(MethodLaws):
    models = ("vit",)

    def make(self) -> Method:
        return FacT()


class TestTK(MethodLaws):
    models = ("vit",)

    def make(self) -> Method:
        return FacT(form="tk", scale=2.0)


def everything(catalog: Catalog) -> Site:
    return next(g for g in catalog.groups() if g.name == "*")


def shared_of(method: FacT, rank: int) -> FacTShared:
    model = tiny_vit().double()
    site = everything(scan(model))
    option = Option("*", "fact", rank, method.cost(site, rank), 0.0, places_of(scan(model), method, site))
    part = method.build(site, option, model, torch.Generator().manual_seed(0))
    with torch.no_grad():
        part.U.copy_(torch.randn(part.U.shape))
    return part


def sites_of_vit_b() -> Site:
    with torch.device("meta"):
        return everything(scan(timm.create_model("vit_base_patch16_224", num_classes=10)))


def test_published_counts_on_vit_b() -> None:
    site = sites_of_vit_b()
    assert FacT().cost(site, 16).trainable == 61_440
    assert FacT(form="tk").cost(site, 32).trainable == 86_528
    assert FacT().width(site) == 768
    assert FacT().cost(site, 1).entries == 84_934_656


def test_hand_worked_slices() -> None:
    """At rank 1, slice l is `scale * s_l u v^T`: the 12 slices of a block in model order, row by row of slices."""
    part = shared_of(FacT(scale=3.0), 1)
    u, v, s = part.U[:, 0], part.V[:, 0], part.S[:, 0, 0]
    block = 3 * torch.outer(u, v)
    qkv, proj, fc1, fc2 = (a.delta()["weight"] for a in part.adapters()[:4])
    torch.testing.assert_close(qkv, torch.cat([s[i] * block for i in range(3)]))
    torch.testing.assert_close(proj, s[3] * block)
    torch.testing.assert_close(fc1, torch.cat([s[i] * block for i in range(4, 8)]))
    torch.testing.assert_close(fc2, torch.cat([s[i] * block for i in range(8, 12)], dim=1))
    torch.testing.assert_close(part.adapters()[4].delta()["weight"][:16], s[12] * block)


@pytest.mark.parametrize("form", ["tt", "tk"])
def test_all_ways_to_use_the_factors_agree(form: str) -> None:
    part = shared_of(FacT(form=form, scale=0.5), 3)  # type: ignore[arg-type]
    cores = part.S if form == "tt" else torch.einsum("lk,kij->lij", part.P, part.C)
    slices = 0.5 * torch.einsum("ai,lij,bj->lab", part.U, cores, part.V)
    first = 0
    for adapter in part.adapters():
        rows, columns = (side // 16 for side in adapter.site.shape)
        own = slices[first : first + rows * columns].view(rows, columns, 16, 16)
        first += rows * columns
        oracle = torch.cat([torch.cat(list(row), dim=1) for row in own])
        torch.testing.assert_close(adapter.delta()["weight"], oracle)
        x = torch.randn(2, 5, adapter.site.in_features, dtype=torch.float64)
        torch.testing.assert_close(adapter.branch(x), x @ oracle.T)
        down, up = adapter.low_rank()
        assert down.shape[0] == 3 * min(rows, columns)
        torch.testing.assert_close(up @ down, oracle)
    assert first == 24


def _hosvd_energy(tensor: np.ndarray, ranks: tuple[int, int, int]) -> float:
    """Energy in the leading left singular vectors of the last two unfoldings, and of the first one after them."""

    def left(unfolded: np.ndarray) -> np.ndarray:
        return np.linalg.svd(unfolded.reshape(len(unfolded), -1), full_matrices=False)[0]

    core = np.einsum("lab,ai,bj->lij", tensor, left(np.moveaxis(tensor, 1, 0)), left(np.moveaxis(tensor, 2, 0)))
    core = np.einsum("lm,lij->mij", left(core)[:, : ranks[0]], core)
    return float((core[:, : ranks[1], : ranks[2]] ** 2).sum())


def _evidence(catalog: Catalog, slices: torch.Tensor) -> Evidence:
    """Signals made of slices (24, 16, 16), laid out as the weights are cut."""
    site, members, first = everything(catalog), {}, 0
    for member in FacT().members(site):
        rows, columns = (side // 16 for side in member.shape)
        own = slices[first : first + rows * columns].view(rows, columns, 16, 16)
        first += rows * columns
        signal = own.transpose(1, 2).reshape(member.shape)
        members[member.name] = Evidence(member, {"weight": TensorEvidence(signal, signal, signal.square())})
    return Evidence(site, {}, members)


@pytest.mark.parametrize("form", ["tt", "tk"])
def test_gains_equal_a_decomposition_by_numpy(form: str) -> None:
    catalog = scan(tiny_vit())
    slices = torch.randn(24, 16, 16, generator=torch.Generator().manual_seed(1))
    method = FacT(form=form)  # type: ignore[arg-type]
    sizes = method.sizes(everything(catalog))
    assert sizes == (1, 2, 3, 4, 6, 8, 12, 16)
    gains = method.gains(everything(catalog), _evidence(catalog, slices), sizes)
    exact = slices.double().numpy()
    for r, gain in zip(sizes, gains, strict=True):
        oracle = _hosvd_energy(exact, (24 if form == "tt" else r, r, r))
        assert gain == pytest.approx(oracle, rel=1e-4)


@pytest.mark.parametrize("form", ["tt", "tk"])
def test_a_signal_of_low_rank_is_captured_whole(form: str) -> None:
    catalog = scan(tiny_vit())
    part = shared_of(FacT(form=form), 3)  # type: ignore[arg-type]
    cores = part.cores(0, 24).detach()
    slices = torch.einsum("ai,lij,bj->lab", part.U.detach(), cores, part.V.detach())
    two, three = FacT(form=form).gains(  # type: ignore[arg-type]
        everything(catalog), _evidence(catalog, slices), (2, 3)
    )
    assert three == pytest.approx(float(slices.square().sum()), rel=1e-5)
    assert two < 0.99 * three


def test_where_it_can_be_used() -> None:
    catalog = scan(tiny_vit())
    used = [site.name for site in (*catalog, *catalog.groups()) if FacT().slots(site)]
    assert used == ["*"]
    assert "patch_embed.proj" not in {m.name for m in FacT().members(everything(catalog))}
    conv = scan(tiny_convnet())
    assert not any(FacT().sizes(site) for site in (*conv, *conv.groups()))


def test_a_hierarchical_model_is_cut_by_its_narrowest_width() -> None:
    with torch.device("meta"):
        site = everything(scan(timm.create_model("swin_tiny_patch4_window7_224", num_classes=10)))
    assert FacT().width(site) == 96
    entries = sum(m.n_weight for m in FacT().members(site))
    assert FacT().cost(site, 4).trainable == 2 * 96 * 4 + entries // 96**2 * 16


def test_members_that_do_not_fit_stay_as_they_are() -> None:
    site = everything(scan(tiny_vit()))
    odd = dataclasses.replace(site.members[2], name="odd", shape=(16, 24))
    group = dataclasses.replace(site, members=(*site.members, odd))
    assert FacT().width(group) == 16
    assert FacT().members(group) == FacT().members(site)


def test_all_members_train_one_tensor() -> None:
    model = tiny_vit()
    catalog = scan(model)
    site, method = everything(catalog), FacT()
    option = Option("*", "fact", 2, method.cost(site, 2), 0.0, places_of(catalog, method, site))
    with Native().insert(model, catalog, Allocation((option,), Budget(10**6)), {"fact": method}) as inserted:
        assert set(inserted.state()) - {n for n in inserted.state() if n.startswith("head/")} == {
            f"adapter/*/fact/{name}" for name in ("U", "V", "S")
        }


@pytest.mark.parametrize("settings", [{"form": "cp"}, {"scale": 0.0}, {"scale": float("inf")}])
def test_settings_out_of_range(settings: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=next(iter(settings))):
        FacT(**settings)  # type: ignore[arg-type]
