"""Scoring by several processes: who looks at which batch, and sums that are the same everywhere."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from autopeft.errors import AutopeftError, UsageError

__all__ = ["Ranks"]


class Ranks:
    """The ranks of the default process group, or one alone where there is none.

    Batch k is looked at by rank k modulo the number of ranks. All ranks draw all batches, so that each sees the same
    ones in the same order whatever their number; only the passes through the model are shared out. Every rank makes
    the same collective calls in the same order, however many batches it had, also after an error.

    Args:
        device: where the tensors that are reduced lie.

    Raises:
        UsageError: when the group cannot reduce tensors of that device.
    """

    def __init__(self, device: torch.device) -> None:
        grouped = dist.is_available() and dist.is_initialized()
        self.number = dist.get_world_size() if grouped else 1
        self._rank = dist.get_rank() if grouped else 0
        self._device = device
        if self.number > 1 and device.type == "cpu" and dist.get_backend() == "nccl":
            raise UsageError(
                "the process group is of nccl, which cannot sum the scores of a model on the CPU; move the model to "
                "the rank's device or use gloo"
            )

    def mine(self, batch: int) -> bool:
        """Whether this rank looks at a batch, by its number in the pass."""
        return batch % self.number == self._rank

    def together(self, work: Callable[[], float], what: str) -> float:
        """Do this rank's share of the work; when it fails on one rank, it fails on all.

        Args:
            work: the share; returns the seconds that it took.
            what: what all ranks must have been given alike, as text.

        Returns:
            The seconds of the slowest rank.

        Raises:
            AutopeftError: when another rank failed; the error of this rank, when it did.
            UsageError: when the ranks were not given the same.
        """
        if self.number == 1:
            return work()
        seconds = 0.0
        error: Exception | None = None
        try:
            seconds = work()
        except Exception as found:  # noqa: BLE001  # whatever it is, the other ranks wait
            error = found
        digest = int.from_bytes(hashlib.sha256(what.encode()).digest()[:7], "big")
        facts = self._reduced([int(error is not None), digest, -digest, round(seconds * 1000)], dist.ReduceOp.MAX)
        if error is not None:
            raise error
        if facts[0]:
            raise AutopeftError("scoring failed on another rank; its own error says why")
        if facts[1] != -facts[2]:
            raise UsageError(
                "the ranks do not score the same thing: scorer, catalogue, data and seed must be the same on each"
            )
        return facts[3] / 1000

    def sums(self, numbers: list[int]) -> list[int]:
        """The sums over the ranks of integers."""
        return numbers if self.number == 1 else self._reduced(numbers, dist.ReduceOp.SUM)

    def add_up(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over the ranks, bit for bit the same on each."""
        if self.number > 1:
            dist.all_reduce(tensor)

    def _reduced(self, numbers: list[int], how: dist.ReduceOp.RedOpType) -> list[int]:
        tensor = torch.tensor(numbers, dtype=torch.int64, device=self._device)
        dist.all_reduce(tensor, how)
        found: list[int] = tensor.tolist()
        return found
