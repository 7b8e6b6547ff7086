"""A Linear whose weight is masked for every sample on its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

__all__ = ["MaskedChange"]


class MaskedChange(Function):
    """`x_b ((m_b - 1) * W)^T` for samples b: what masking the weight changes in the output.

    Arguments of `apply`: x (B, T, in); logits (B, out, in); weight (out, in); temperature; threshold. The mask is 1
    where `sigmoid(logits / temperature) > threshold`; the logits' gradient is the sigmoid's, straight through the
    step. Of what has the size of B weights the logits alone are kept for the backward pass.
    """

    @staticmethod
    def forward(x: Tensor, logits: Tensor, weight: Tensor, temperature: float, threshold: float) -> Tensor:
        """One product per sample."""
        return -torch.bmm(x, _removed(logits, weight.to(x.dtype), temperature, threshold).mT)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the arguments."""
        x, logits, weight, ctx.temperature, ctx.threshold = inputs
        ctx.save_for_backward(x, logits, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        """Gradients of x and of the logits; the weight is frozen."""
        x, logits, weight = ctx.saved_tensors
        grad_x = grad_logits = None
        grad = grad.to(x.dtype)
        if ctx.needs_input_grad[0]:
            grad_x = -torch.bmm(grad, _removed(logits, weight.to(x.dtype), ctx.temperature, ctx.threshold))
        if ctx.needs_input_grad[1]:
            soft = torch.sigmoid(logits / ctx.temperature)
            slope = soft * (1 - soft) / ctx.temperature
            grad_logits = torch.bmm(grad.mT, x).to(logits.dtype) * weight.to(logits.dtype) * slope
        return grad_x, grad_logits, None, None, None


def _removed(logits: Tensor, weight: Tensor, temperature: float, threshold: float) -> Tensor:
    """What the mask takes away: the weight where the mask is 0."""
    kept = torch.sigmoid(logits / temperature) > threshold
    return weight.expand_as(logits).masked_fill(kept, 0.0)
