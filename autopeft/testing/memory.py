"""Counting the bytes of the tensors that are alive."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

__all__ = ["LiveBytes"]


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves its hook untyped
    """Inside of it, every new storage is counted until it is freed, whatever the device (`meta` too).

    Views share a storage and are counted once. What an operation takes for itself and gives back before it returns is
    not seen. Backward passes inside of it are.

    Args:
        held: tensors that exist already, and are to be counted with the others.

    Attributes:
        live: bytes alive now, tensors freed after the end included.
        peak: most bytes that were alive at a time since the start or the last `reset`.
    """

    def __init__(self, held: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # as above
        self.live = 0
        self.peak = 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        for tensor in held:
            self._see(tensor)

    def reset(self) -> None:
        """Forget the peak so far."""
        self.peak = self.live

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def free(_: object, known: dict[int, Any] = self._known) -> None:
            del known[key]
            self.live -= size

        self._known[key] = weakref.ref(storage, free)
        self.live += size
        self.peak = max(self.peak, self.live)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_iter(out):
            if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
                self._see(leaf)
        return out
