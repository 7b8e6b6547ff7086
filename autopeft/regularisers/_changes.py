"""The adapters of an inserted model, one by one, and the changes of tensors that they make."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch
from torch import Tensor

from autopeft.core.contracts import Inserted
from autopeft.methods.base import Adapter, Shared

__all__ = ["adapters_of", "additive", "exactly", "note_nothing"]

_LOG = logging.getLogger(__name__)


def adapters_of(inserted: Inserted) -> Iterator[tuple[str, Adapter]]:
    """Option key to adapter, in the plan's order; options that share parameters give each of their members."""
    for key, part in inserted.named_adapters().items():
        if isinstance(part, Shared):
            yield from ((f"{key} at {adapter.site.name}", adapter) for adapter in part.adapters())
        elif isinstance(part, Adapter):
            yield key, part


@torch.no_grad()
def additive(inserted: Inserted, *, matrices: bool = False) -> list[Adapter]:
    """The adapters whose change of the site's tensors is additive.

    Args:
        inserted: the model.
        matrices: only those that change a weight of two or more dimensions.
    """
    found = []
    for _, adapter in adapters_of(inserted):
        change = adapter.delta()
        if ("weight" in change and change["weight"].ndim > 1) if matrices else change:
            found.append(adapter)
    return found


def exactly(tensor: Tensor) -> torch.autocast:
    """A context in which the tensor's device computes in the precision of its operands, autocast or not."""
    return torch.autocast(tensor.device.type, enabled=False)


def note_nothing(name: str, what: str) -> None:
    """Say that a regulariser finds nothing in a plan to act on; a search meets such plans, so it is no error."""
    _LOG.warning("%s adds nothing: no option of the plan has %s", name, what)
