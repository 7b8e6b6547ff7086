"""Everything about a borrowed model that an insertion may disturb, and putting it back."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Snapshot"]


class Snapshot:
    """Flags, modes, buffers and attributes of a plain model.

    Taken before anything is inserted. `restore` undoes what training in place may have changed; the structure (child
    modules, overridden forwards) is undone by whoever changed it.

    Args:
        model: the plain model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = list(model.modules())
        self.parameters = list(model.parameters())
        self._modes = [module.training for module in self.modules]
        self._flags = [parameter.requires_grad for parameter in self.parameters]
        self._buffers: list[tuple[nn.Module, str, Tensor, Tensor]] = [
            (module, name, buffer, buffer.detach().clone())
            for module in self.modules
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]

    def freeze(self) -> None:
        """No base parameter receives a gradient."""
        for parameter in self.parameters:
            parameter.requires_grad_(False)

    def restore(self) -> None:
        """Put flags, modes and buffers back; tensors keep their identity, and their version when nothing changed."""
        for parameter, flag in zip(self.parameters, self._flags, strict=True):
            parameter.requires_grad_(flag)
        for module, mode in zip(self.modules, self._modes, strict=True):
            module.training = mode
        with torch.no_grad():
            for module, name, buffer, value in self._buffers:
                module._buffers[name] = buffer
                if not torch.equal(buffer, value.to(buffer.device)):
                    buffer.copy_(value)
