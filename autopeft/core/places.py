"""Which places an option of a method occupies."""

from __future__ import annotations

from autopeft.core.contracts import GroupMethod, Method
from autopeft.core.site import Catalog, Place, Site

__all__ = ["places_of"]


def places_of(catalog: Catalog, method: Method, site: Site) -> tuple[Place, ...]:
    """The places, sorted; empty where the method cannot be used.

    Args:
        catalog: the model's sites.
        method: the method. On a group only methods that say which members they change occupy anything.
        site: one of the catalogue's sites or groups.
    """
    if site.kind != "group":
        return tuple(sorted(catalog.places(site, method.slots(site))))
    if not isinstance(method, GroupMethod):
        return ()
    return tuple(sorted({place for member, slots in method.parts(site) for place in catalog.places(member, slots)}))
