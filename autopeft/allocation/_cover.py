"""Which sites an option is missing at because the budget could not pay for it there."""

from __future__ import annotations

from autopeft.core.site import Site

__all__ = ["serves_as_well"]


def serves_as_well(site: Site, other: Site) -> bool:
    """Whether a method that has options at `other` must have some at `site`: alike, and no smaller anywhere."""
    return (
        (site.kind, site.groups) == (other.kind, other.groups)
        and set(site.slots) >= set(other.slots)
        and site.out_features >= other.out_features
        and site.in_features >= other.in_features
    )
