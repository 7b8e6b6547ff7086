"""Where a model lies."""

from __future__ import annotations

import torch
from torch import nn

from autopeft.errors import UsageError

__all__ = ["check_device"]


def check_device(model: nn.Module, device: torch.device | str) -> torch.device:
    """The device, once the model is known to lie on it.

    Raises:
        UsageError: when the model's first parameter lies on a device of another type.
    """
    wanted = torch.device(device)
    for parameter in model.parameters():
        if parameter.device.type != wanted.type:
            raise UsageError(f"the model lies on {parameter.device}, not on {wanted}; move it there first")
        return parameter.device
    return wanted
