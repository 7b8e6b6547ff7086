"""Evidence about residual branches."""

from __future__ import annotations

from collections.abc import Mapping

from autopeft.core.scores import Evidence
from autopeft.core.site import Catalog

__all__ = ["of_branches"]


def of_branches(catalog: Catalog, evidence: Mapping[str, Evidence]) -> dict[str, Evidence]:
    """What is known about residual branches: what was seen of their blocks.

    The gradient of a branch's output is that of its block's output, up to the branches after it, so the block's
    matrix `sum over tokens of dL/dy y^T` serves for them as well and costs no further product.

    Args:
        catalog: the catalogue.
        evidence: evidence by site name, of blocks among others.
    """
    found: dict[str, Evidence] = {}
    blocks = [site for site in catalog if site.kind == "block" and site.name in evidence]
    for site in catalog:
        if site.kind == "residual":
            block = next((b for b in blocks if site.name.startswith(f"{b.name}.") and b.shape == site.shape), None)
            if block is not None:
                found[site.name] = Evidence(site, evidence[block.name].slots)
    return found
