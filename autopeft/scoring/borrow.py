"""Looking at a model without leaving a trace on it."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import nn

__all__ = ["borrowed"]


@contextlib.contextmanager
def borrowed(model: nn.Module, trainable: Iterable[nn.Parameter] | None = None) -> Iterator[None]:
    """Put a model into evaluation mode for a while, and give it back as it was.

    On exit, also after an exception, every module has its training flag again, every parameter its `requires_grad`
    flag and its own `.grad` object, and Python's, numpy's and torch's random states are those of before. Weights and
    buffers are not copied: in evaluation mode nothing writes to them.

    Args:
        model: the model; not called here.
        trainable: the parameters that require a gradient meanwhile, all others do not; None leaves the flags alone.
    """
    modes = [(module, module.training) for module in model.modules()]
    states = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]  # torch does not type it
    cpu, numpy_state, python_state = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        model.eval()
        wanted = None if trainable is None else {id(p) for p in trainable}
        for p, flag, _ in states:
            p.requires_grad_(flag if wanted is None else id(p) in wanted)
            p.grad = None
        yield
    finally:
        for p, flag, grad in states:
            p.requires_grad_(flag)
            p.grad = grad
        for module, mode in modes:
            module.training = mode
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
        np.random.set_state(numpy_state)
        random.setstate(python_state)
