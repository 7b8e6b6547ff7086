"""What methods of groups have in common."""

from __future__ import annotations

import torch
from torch import Tensor

from autopeft.core.scores import Evidence
from autopeft.core.site import Site, Slot
from autopeft.errors import UsageError
from autopeft.methods._traits import ChoosesNothing

__all__ = ["Grouped", "member_evidence", "member_signal"]


class Grouped(ChoosesNothing):
    """A method for groups that chooses no entries and, unless it says otherwise, changes the members' weights.

    A group itself has no slots, so `slots` lists what is taken on any of its members.
    """

    __slots__ = ()

    def members(self, site: Site) -> tuple[Site, ...]:
        """The members of a group that it changes; empty when it cannot be used on the site."""
        raise NotImplementedError(f"{type(self).__name__} does not say which members it changes")

    def parts(self, site: Site) -> tuple[tuple[Site, tuple[Slot, ...]], ...]:
        """The members with the slots it occupies there."""
        return tuple((member, ("weight",)) for member in self.members(site))

    def slots(self, site: Site) -> tuple[Slot, ...]:
        """The slots it occupies on its members, in order of their first use."""
        return tuple(dict.fromkeys(slot for _, slots in self.parts(site) for slot in slots))

    def mergeable(self, site: Site) -> bool:
        """Yes: the changes are ones of the hosts' own tensors."""
        return True


def member_evidence(evidence: Evidence, member: Site) -> Evidence:
    """What is known about one member of a group.

    Raises:
        UsageError: when the scorer kept nothing about it.
    """
    known = evidence.members.get(member.name)
    if known is None:
        raise UsageError(f"the scorer kept nothing about {member.name}, a member of {evidence.site.name}")
    return known


def member_signal(evidence: Evidence, member: Site) -> Tensor:
    """The signal of a member's weight, flattened to (out, in), on the CPU; float32, or float64 for one of that type."""
    signal = member_evidence(evidence, member)["weight"].signal.detach()
    return signal.flatten(1).to(device="cpu", dtype=torch.promote_types(signal.dtype, torch.float32))
