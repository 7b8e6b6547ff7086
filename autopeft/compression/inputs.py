"""The mean input of every layer: what DAREx-q weighs a change with."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["contributions", "droppable", "mean_inputs"]


def droppable(model: nn.Module, classifier: Sequence[str]) -> tuple[str, ...]:
    """Names of the weights that entries may be dropped from, in model order.

    Those of Linear and convolutional layers, and the fused projection of `nn.MultiheadAttention`. Biases, norms,
    embeddings, tokens and the classifier are few and each of their entries matters: they are left whole.

    Args:
        model: the model.
        classifier: names of the classifier's tensors.
    """
    found = []
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            found.append(f"{path}.weight" if path else "weight")
        elif isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            found.append(f"{path}.in_proj_weight" if path else "in_proj_weight")
    return tuple(name for name in found if name not in classifier)


def mean_inputs(model: nn.Module, weights: Sequence[str], run: Callable[[], object]) -> dict[str, Tensor]:
    """The mean of what each weight's entries are multiplied with, over all samples and positions.

    Args:
        model: the trained model.
        weights: names of weights.
        run: runs the model on some data, without gradients.

    Returns:
        Weight to float64 on the CPU: (in_features,) for Linear, (groups, in_channels / groups * kernel height * kernel
        width) for Conv2d. Weights of other layers, of layers whose output is not linear in their weight, and of layers
        that were never called are left out.
    """
    totals: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def watch(name: str, module: nn.Module, given: tuple[Any, ...]) -> None:
        x = given[0].detach()
        if isinstance(module, nn.Conv2d):
            total, count = _patch_sums(module, x if x.ndim == 4 else x.unsqueeze(0))
        else:
            total, count = x.flatten(0, -2).double().sum(dim=0), x.numel() // x.shape[-1]
        totals[name] = totals.get(name, 0) + total.cpu()
        counts[name] = counts.get(name, 0) + count

    handles = []
    for name in weights:
        module = model.get_submodule(name.rpartition(".")[0])
        if _is_linear_in_its_weight(module):
            handles.append(module.register_forward_pre_hook(functools.partial(watch, name)))
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return {name: totals[name] / counts[name] for name in weights if name in totals}


def contributions(change: Tensor, mean_input: Tensor, bias: Tensor | None = None) -> Tensor:
    """`c_ij`: the change of every weight times the mean of its input, float64 of shape (out, inputs per output).

    Args:
        change: change of the weight, in the weight's shape.
        mean_input: as `mean_inputs` gives it.
        bias: change of the bias, (out,); one more column, its input is 1.
    """
    flat = change.double().flatten(1)
    if mean_input.ndim == 2:
        mean_input = mean_input.repeat_interleave(flat.shape[0] // mean_input.shape[0], dim=0)
    found = flat * mean_input
    return found if bias is None else torch.cat([found, bias.double().unsqueeze(1)], dim=1)


def _is_linear_in_its_weight(module: nn.Module) -> bool:
    """Whether the module runs the plain forward: weight-standardised convolutions and the like do not."""
    return type(module).forward in (nn.Linear.forward, nn.Conv2d.forward)


def _patch_sums(conv: nn.Conv2d, x: Tensor) -> tuple[Tensor, int]:
    """Sum over samples and output positions of what each kernel entry sees, (groups, entries), and their number."""
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    padded = F.pad(x, conv._reversed_padding_repeated_twice, mode=mode)
    (down, across), (kernel_h, kernel_w), (gap_h, gap_w) = conv.stride, conv.kernel_size, conv.dilation
    height = (padded.shape[2] - gap_h * (kernel_h - 1) - 1) // down + 1
    width = (padded.shape[3] - gap_w * (kernel_w - 1) - 1) // across + 1
    sums = torch.empty(x.shape[1], kernel_h, kernel_w, dtype=torch.float64)
    for i in range(kernel_h):
        for j in range(kernel_w):
            top, left = i * gap_h, j * gap_w
            rows = slice(top, top + (height - 1) * down + 1, down)
            columns = slice(left, left + (width - 1) * across + 1, across)
            seen = padded[:, :, rows, columns]
            sums[:, i, j] = seen.double().sum(dim=(0, 2, 3)).cpu()
    return sums.view(conv.groups, -1), x.shape[0] * height * width
