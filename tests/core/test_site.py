from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from autopeft.core.site import Catalog, Place, Site
from autopeft.errors import UsageError

GOOD: dict[str, Any] = {
    "name": "fc",
    "module": "fc",
    "kind": "linear",
    "shape": (8, 4),
    "has_bias": True,
    "depth": 0,
    "role": "mlp.fc1",
    "slots": ("weight",),
}


def test_counts_of_a_linear_site() -> None:
    site = Site(**GOOD)
    assert (site.out_features, site.in_features, site.n_weight, site.n_bias) == (8, 4, 32, 8)
    assert site.is_matrix


def test_counts_of_a_grouped_convolution() -> None:
    # 6 output channels, 4 / 2 input channels per group, a 3 x 5 kernel
    site = Site(**GOOD | {"kind": "conv2d", "shape": (6, 2, 3, 5), "has_bias": False, "groups": 2})
    assert (site.out_features, site.in_features, site.n_weight, site.n_bias) == (6, 30, 180, 0)
    assert site.is_matrix


def test_counts_of_a_norm() -> None:
    site = Site(**GOOD | {"kind": "layer_norm", "shape": (16,)})
    assert (site.in_features, site.n_weight, site.n_bias, site.is_matrix) == (1, 16, 16, False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": ""}, "needs a name"),
        ({"shape": ()}, "at least 1"),
        ({"shape": (8, 0)}, "at least 1"),
        ({"kind": "lstm"}, "unknown kind 'lstm'"),
        ({"depth": -1}, "depth"),
        ({"slots": ("weight", "weight")}, "distinct"),
        ({"slots": ("colour",)}, "slots of fc"),
        ({"rows": (0, 4)}, "do not match its shape"),
        ({"groups": 0}, "groups"),
    ],
)
def test_a_site_is_checked(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Site(**GOOD | change)


def test_a_place_reads_site_and_slot() -> None:
    assert str(Place("blocks.0.fc", "bias")) == "blocks.0.fc:bias"
    assert sorted([Place("b", "bias"), Place("a", "weight"), Place("a", "bias")])[0] == Place("a", "bias")


def test_candidates_of_a_fused_projection(catalog: Catalog) -> None:
    assert [s.name for s in catalog.candidates("whole")] == ["qkv", "fc"]
    assert [s.name for s in catalog.candidates("slices")] == ["qkv[q]", "qkv[k]", "fc"]
    assert [s.name for s in catalog.candidates("both")] == ["qkv", "qkv[q]", "qkv[k]", "fc"]


def test_the_whole_occupies_the_places_of_its_slices(catalog: Catalog) -> None:
    assert catalog.places(catalog["qkv"], ("weight",)) == (Place("qkv[q]", "weight"), Place("qkv[k]", "weight"))
    assert catalog.places(catalog["qkv[q]"], ("weight",)) == (Place("qkv[q]", "weight"),)
    assert catalog.places(catalog["fc"], ("weight", "bias")) == (Place("fc", "weight"), Place("fc", "bias"))


def test_looking_sites_up(catalog: Catalog) -> None:
    assert catalog["fc"].depth == 1
    assert "fc" in catalog
    assert "fc2" not in catalog
    assert len(catalog) == 4
    with pytest.raises(UsageError, match="no site called 'fc2'"):
        catalog["fc2"]


def test_the_fingerprint_follows_the_structure_and_nothing_else(catalog: Catalog) -> None:
    same = dataclasses.replace(catalog, architecture="Renamed")
    assert same.fingerprint == catalog.fingerprint
    assert len(catalog.fingerprint) == 12
    for change in (
        {"n_base": 1001},
        {"n_head": 11},
        {"head": ("fc",)},
        {"n_depth": 3},
        {"sites": catalog.sites[:3]},
        {"sites": (*catalog.sites[:3], dataclasses.replace(catalog.sites[3], shape=(8, 5)))},
        {"sites": (*catalog.sites[:3], dataclasses.replace(catalog.sites[3], depth=0))},
        {"sites": (*catalog.sites[:3], dataclasses.replace(catalog.sites[3], slots=("weight", "output")))},
    ):
        assert dataclasses.replace(catalog, **change).fingerprint != catalog.fingerprint, change


def test_a_catalogue_is_checked(catalog: Catalog) -> None:
    fc = catalog["fc"]
    with pytest.raises(ValueError, match="listed more than once: fc"):
        Catalog((fc, fc), (), 1, 0, 2)
    with pytest.raises(ValueError, match="has depth 1, but the catalogue has 1 blocks"):
        Catalog((fc,), (), 1, 0, 1)
    with pytest.raises(ValueError, match="bad totals"):
        Catalog((), (), -1, 0, 1)
    with pytest.raises(ValueError, match=r"refers to unlisted sites: qkv$"):
        Catalog((catalog["qkv[q]"],), (), 1, 0, 1)
