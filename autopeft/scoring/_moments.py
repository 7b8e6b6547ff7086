"""Running sums of one tensor's gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from autopeft.scoring._hosts import Known

__all__ = ["Make", "Moments", "plain_sums"]


class Moments:
    """Sums over the gradients of one tensor, in float32, or float64 for a tensor in float64.

    Args:
        shape: shape of the tensor.
        like: a tensor with its type and device.
        halves: whether the first moment is kept for each half of the pass.
    """

    def __init__(self, shape: torch.Size, like: Tensor, halves: bool) -> None:
        dtype = torch.promote_types(like.dtype, torch.float32)
        self.first = [torch.zeros(shape, dtype=dtype, device=like.device) for _ in range(1 + halves)]
        self.second = torch.zeros(shape, dtype=dtype, device=like.device)

    def add(self, gradient: Tensor, weight: float, half: int) -> None:
        """One gradient: `weight` times itself to the first moment, its square to the second."""
        self.first[half].add_(gradient, alpha=weight)
        if gradient.dtype != self.second.dtype:
            gradient = gradient.to(self.second.dtype)
        self.second.addcmul_(gradient, gradient)

    def add_samples(self, gradients: Tensor, half: int) -> None:
        """The gradients of several samples along axis 0, each of weight one."""
        self.first[half].add_(gradients.sum(0))
        self.add_squares(gradients)

    def add_squares(self, gradients: Tensor) -> None:
        """The squares of the gradients of several samples along axis 0."""
        self.second.add_(gradients.to(self.second.dtype).square().sum(0))

    def to(self, like: Tensor) -> None:
        """Move the sums to where those of `like` would be kept, in their type."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        self.first = [first.to(like.device, dtype) for first in self.first]
        self.second = self.second.to(like.device, dtype)

    def known(self, samples: tuple[int, int]) -> Known:
        """Mean gradients over so many samples in each half of the pass, and the sum of squares, on the CPU.

        The sums are spent: the mean of squares is left to those who need it, as one more copy of the model.
        """
        total = self.first[0] if len(self.first) == 1 else self.first[0] + self.first[1]
        halves = (
            [half.div_(n).cpu() for half, n in zip(self.first, samples, strict=True)] if len(self.first) == 2 else []
        )
        return Known(
            signal=total.div_(sum(samples)).cpu(),
            score=self.second.cpu(),
            half_a=halves[0] if halves else None,
            half_c=halves[1] if halves else None,
        )


Make = Callable[[str, torch.Size, Tensor, bool], Moments]
"""Makes the sums of one tensor: its key, shape, a tensor with its type and device (the parameter itself, where there is
one), and whether the halves of the pass are kept apart."""


def plain_sums(key: str, shape: torch.Size, like: Tensor, halves: bool) -> Moments:
    """First and second moments alone."""
    return Moments(shape, like, halves)
