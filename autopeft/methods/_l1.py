"""The entrywise L1 norm of a product that is too large to hold."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

__all__ = ["L1OfProduct"]

_CHUNK = 1 << 22
"""Entries of the block of a product that is held at a time."""


class L1OfProduct(Function):
    """`sum |P Q^T|` for P (n, r) and Q (m, r), in blocks of rows: the (n, m) product is never held, nor saved.

    Value and gradients are computed together in the forward pass, since what the backward pass needs of the product is
    its signs, which would take as much memory.
    """

    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor) -> Tensor:
        """The sum, a scalar."""
        total = left.new_zeros(())
        grad_left, grad_right = torch.empty_like(left), torch.zeros_like(right)
        step = max(1, _CHUNK // max(1, len(right)))
        for start in range(0, len(left), step):
            rows = left[start : start + step]
            product = rows @ right.T
            total = total + product.abs().sum()
            signs = product.sign_()
            grad_left[start : start + step] = signs @ right
            grad_right += signs.T @ rows
        ctx.save_for_backward(grad_left, grad_right)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        """What the forward pass prepared, times the incoming gradient."""
        grad_left, grad_right = ctx.saved_tensors
        return grad * grad_left, grad * grad_right
