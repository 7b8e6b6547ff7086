"""Small values that several tests of core use."""

from __future__ import annotations

import pytest

from autopeft.core.site import Catalog, Site


@pytest.fixture
def sites() -> tuple[Site, ...]:
    """A fused projection of width 4 with its slices, and the layer after it."""
    return (
        Site(
            "qkv",
            "blocks.0.qkv",
            "linear",
            (12, 4),
            True,
            0,
            "attn.qkv",
            ("weight", "bias"),
            parts=("qkv[q]", "qkv[k]"),
        ),
        Site("qkv[q]", "blocks.0.qkv", "linear", (4, 4), True, 0, "attn.q", ("weight",), rows=(0, 4), parent="qkv"),
        Site("qkv[k]", "blocks.0.qkv", "linear", (4, 4), True, 0, "attn.k", ("weight",), rows=(4, 8), parent="qkv"),
        Site("fc", "blocks.1.fc", "linear", (8, 4), False, 1, "mlp.fc1", ("weight",)),
    )


@pytest.fixture
def catalog(sites: tuple[Site, ...]) -> Catalog:
    """A catalogue of those sites."""
    return Catalog(sites, ("head",), 1000, 10, 2, "Tiny")
