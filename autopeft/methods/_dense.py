"""A trained change of every entry of some of a host's tensors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from autopeft.core.site import Site, Slot
from autopeft.methods._axis import along
from autopeft.methods._host import host_tensor, is_plain, new_parameter, rows_of
from autopeft.methods.base import Adapter

__all__ = ["DenseAdapter"]


class DenseAdapter(Adapter):
    """One parameter per slot, called like the slot, of the stored shape, zero at the start.

    The parameter is the change and not the changed tensor, so that weight decay pulls towards the pre-trained value.
    """

    bias: nn.Parameter

    def __init__(self, site: Site, host: nn.Module, slots: tuple[Slot, ...]) -> None:
        super().__init__(site, slots, "branch" if slots == ("bias",) and is_plain(host) else "swap")
        for slot in slots:
            tensor = rows_of(site, host_tensor(site, host, "bias" if slot == "bias" else site.parameter))
            self.register_parameter(slot, new_parameter(host, torch.zeros(tensor.shape)))

    def branch(self, x: Tensor) -> Tensor:
        """The change of the bias, laid along the channels."""
        return along(self.bias, x.ndim, self.site.channel_axis)

    def delta(self) -> dict[str, Tensor]:
        """The parameters themselves."""
        return dict(self.named_parameters())
