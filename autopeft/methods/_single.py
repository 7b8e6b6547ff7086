"""What methods of one size have in common."""

from __future__ import annotations

from autopeft.core.site import Site, Slot
from autopeft.methods._traits import ChoosesNothing

__all__ = ["SingleSize"]


class SingleSize(ChoosesNothing):
    """A method whose only size is 1 and that chooses no entries."""

    __slots__ = ()

    def slots(self, site: Site) -> tuple[Slot, ...]:
        """The slots it occupies on this site."""
        raise NotImplementedError(f"{type(self).__name__} does not say which slots it occupies")

    def sizes(self, site: Site) -> tuple[int, ...]:
        """1 where it can be used."""
        return (1,) if self.slots(site) else ()

    def mergeable(self, site: Site) -> bool:
        """Yes: the change is one of the host's own tensors."""
        return True
