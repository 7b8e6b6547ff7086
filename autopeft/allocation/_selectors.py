"""Sites and methods of a menu by name, glob or role."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from autopeft.allocation._roles import role_group
from autopeft.core.menu import Menu, Option
from autopeft.core.site import Site
from autopeft.errors import UsageError

__all__ = ["METHOD", "Selectors", "touched"]

METHOD = "method:"
_ROLE = "role:"


def touched(option: Option) -> frozenset[str]:
    """The sites that an option is bought at: its own, those of its places, and the whole of every slice among them."""
    names = {option.site, *(place.site for place in option.places)}
    return frozenset(names | {_whole(name) for name in names})


def _whole(name: str) -> str:
    """A row slice of a fused projection is called as the whole, with the slice's name in brackets behind it."""
    return name.partition("[")[0] if name.endswith("]") else name


class Selectors:
    """What a menu's sites and methods can be spoken of as.

    A selector is the name of a site; a glob over names (`blocks.11.*`), where `[` is a plain character; `role:` with a
    role, a glob over roles or a group of them (`role:attn.qkv`, `role:attn.*`, `role:mlp`); or `method:` with the key
    of a method or a glob over keys.
    """

    def __init__(self, menu: Menu) -> None:
        listed = {name: site for site in menu.sites.values() for name, site in _with_members(site)}
        self.names = tuple(dict.fromkeys([*listed, *sorted({n for o in menu.options for n in touched(o)})]))
        self.methods = tuple(sorted({o.method for o in menu.options}))
        self._sites = listed

    def role(self, name: str) -> str:
        """The role of a site; the empty string when the menu does not know the site."""
        return self._sites[name].role if name in self._sites else ""

    def depth(self, name: str) -> int | None:
        """The block of a site; None for groups, and when the menu does not know the site."""
        site = self._sites.get(name)
        return None if site is None or site.kind == "group" else site.depth

    def sites(self, selector: str, setting: str) -> tuple[str, ...]:
        """Names of the sites that a selector means; the name itself where it is one.

        Raises:
            UsageError: when it means no site.
        """
        if selector in self.names:
            return (selector,)
        if selector.startswith(_ROLE):
            wanted = selector.removeprefix(_ROLE)
            found = [n for n, site in self._sites.items() if _has_role(site, wanted)]
        else:
            found = [n for n in self.names if fnmatchcase(n, selector.replace("[", "[[]"))]
        if not found:
            raise UsageError(
                f"{setting} of the knapsack names {selector!r}, which is not a site of this menu, nor a glob or "
                f"role:ROLE that means one; `autopeft inspect MODEL` lists sites and roles"
            )
        return tuple(found)

    def keys(self, selector: str) -> tuple[str, ...]:
        """Keys of the methods on the menu that `method:...` means."""
        return tuple(key for key in self.methods if fnmatchcase(key, selector.removeprefix(METHOD)))


def _has_role(site: Site, wanted: str) -> bool:
    return fnmatchcase(site.role, wanted) or role_group(site) == wanted


def _with_members(site: Site) -> Iterable[tuple[str, Site]]:
    yield site.name, site
    for member in site.members:
        yield member.name, member
