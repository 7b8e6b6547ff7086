"""A tile of the piecewise kernel in one launch, for CUDA.

Tested only where there is a CUDA device, with the mark `gpu`. All that it does, `_kernels` and `_sparsifiers` do with
torch alone.
"""

from __future__ import annotations

import importlib.util
from typing import Literal

import torch
from torch import Tensor

from autopeft.methods._kernels import Distances, Kernel, KernelTiles
from autopeft.methods._sparsifiers import Cut, Sparsifier

__all__ = ["TritonTiles", "fused_tiles"]

_MODES = {"kernel": 0, "change": 1, "pull": 2}
_CODES = {"soft": 0, "square": 1, "hard": 2, "none": 3}
_BLOCK = 32


def fused_tiles(kernel: Kernel, A: Tensor, B: Tensor, s: Tensor, learn: bool) -> KernelTiles | None:
    """One launch per tile where that is possible: piecewise with p = 2, scalars fixed, float32, Triton on CUDA."""
    if not A.is_cuda or A.dtype != torch.float32 or learn or (kernel.name, kernel.norm_p) != ("piecewise", 2.0):
        return None
    if torch.cuda.get_device_capability(A.device) < (7, 0) or importlib.util.find_spec("triton") is None:
        return None
    return TritonTiles(kernel, A, B, s, learn)


class TritonTiles(Distances):
    """`Distances` with distances, threshold, mask and slopes in one launch per tile; the products stay torch's."""

    def value(self, start: int, stop: int) -> Tensor:
        """See `KernelTiles.value`."""
        return self._launch("kernel", start, stop, Sparsifier("none"), None, None, None)[0]

    def change(
        self, start: int, stop: int, sparsifier: Sparsifier, cut: Cut | None, offset: Tensor | None, grad: Tensor | None
    ) -> Tensor:
        """See `KernelTiles.change`."""
        if grad is not None:
            weights = self._launch("pull", start, stop, sparsifier, cut, None, grad.contiguous())
            for half, weight in zip(self.halves, weights, strict=True):
                half.pull(weight, start, stop)
        return self._launch("change", start, stop, sparsifier, cut, offset, None)[0]

    def _pulls(self) -> Tensor:
        """The launch has multiplied by the scalars already."""
        return torch.ones_like(self.s[:2])

    def _launch(
        self,
        mode: Literal["kernel", "change", "pull"],
        start: int,
        stop: int,
        sparsifier: Sparsifier,
        cut: Cut | None,
        offset: Tensor | None,
        grad: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        from autopeft.methods._snell_launch import tile

        out, n, rank = len(self.B), stop - start, self.B.shape[1]
        first = self.B.new_empty(out, n)
        second = torch.empty_like(first) if mode == "pull" else first
        # What a mode does not read may be any tensor.
        tile[(-(-out // _BLOCK), -(-n // _BLOCK))](
            self.A[start:stop],
            self.B,
            self.s,
            first if offset is None else offset,
            first if cut is None else cut.level,
            first if grad is None else grad,
            first,
            second,
            out,
            n,
            0 if cut is None else min(max(cut.bound - start * out, 0), n * out),
            rank=rank,
            half=(rank + 1) // 2,
            mode=_MODES[mode],
            sparsifier=_CODES[sparsifier.name],
            shifted=offset is not None,
            block=_BLOCK,
        )
        return first, second
