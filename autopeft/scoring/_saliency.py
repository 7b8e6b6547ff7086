"""What scorers made for pruning share: values of the entries, and signals whose square is the score."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from autopeft.scoring._hosts import Hosts

__all__ = ["signed_root", "values_of"]


def values_of(hosts: Hosts) -> Iterator[tuple[str, Tensor]]:
    """Key and pre-trained value of every tensor: on the CPU, at least float32, not to be written to."""
    for key, parameter in hosts.parameters.items():
        yield key, parameter.detach().to("cpu", torch.promote_types(parameter.dtype, torch.float32))


def signed_root(score: Tensor, direction: Tensor) -> Tensor:
    """The root of a score with the sign of another tensor; an entry without a direction counts as positive."""
    return score.sqrt().copysign_(direction)
