"""Which device to run on."""

from __future__ import annotations

import torch

from autopeft.errors import UsageError

__all__ = ["choose_device"]


def choose_device(name: str) -> torch.device:
    """The device called `name`; `auto` is the first accelerator there is, else the CPU.

    Raises:
        UsageError: when the device does not exist on this machine.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"there is no device called {name!r}; use auto, cpu, cuda or cuda:0") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            f"device {name!r} was asked for, but this machine has no usable CUDA device; use --device auto"
        )
    return device
