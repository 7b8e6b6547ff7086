"""Tensors in codes of a few bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from autopeft.compression.loader import unpack
from autopeft.errors import UsageError
from autopeft.methods.codes import MOST_BITS, lloyd_codes, pack

__all__ = ["Codes", "Quantised", "pack", "quantise"]

Codes = Literal["lloyd", "uniform"]
"""`lloyd`: the L1-optimal values of a normal distribution, with the tensor's mean and deviation; `uniform`: evenly
spaced from the tensor's smallest entry to its largest."""


@dataclass(frozen=True, slots=True, eq=False)
class Quantised:
    """A tensor whose every entry is a code; see `values` for what a code stands for.

    Attributes:
        packed: the codes, `bits` bits each, as bytes: uint8 of shape (ceil(bits n / 8),).
        shape: shape of the tensor.
        bits: bits per entry.
        codes: which values the codes stand for.
        scale: what these values are multiplied with; a float32 number.
        offset: what is then added; a float32 number.
    """

    packed: Tensor
    shape: tuple[int, ...]
    bits: int
    codes: Codes
    scale: float
    offset: float

    def table(self) -> Tensor:
        """The values before scale and offset: float32 of shape (2^bits,)."""
        if self.codes == "uniform":
            return torch.arange(2**self.bits, dtype=torch.float32)
        return torch.from_numpy(lloyd_codes(self.bits).astype(np.float32))

    def values(self) -> Tensor:
        """The tensor that the codes stand for, float32: `table[code] * scale + offset`."""
        count = int(np.prod(self.shape, dtype=np.int64))
        codes = torch.from_numpy(unpack(self.packed.numpy(), self.bits, count)).long()
        return (self.table()[codes] * self.scale + self.offset).view(self.shape)


def quantise(tensor: Tensor, bits: int, codes: Codes = "lloyd") -> Quantised:
    """Replace every entry by the nearest value that a code of `bits` bits stands for.

    With `lloyd` the entries are standardised with the tensor's own mean and standard deviation (of the entries
    themselves, divisor n) and compared with `lloyd_codes` (arXiv 2307.16867). The paper adds 1e-5 to the deviation,
    which is harmless for weights and fatal for the small changes that are quantised here; nothing is added, and a
    tensor of equal entries is represented exactly.

    Args:
        tensor: any shape, at least one entry.
        bits: 1 to 8.
        codes: see `Codes`.

    Raises:
        UsageError: for another number of bits, unknown codes, an empty tensor, or entries that are not finite.
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= MOST_BITS:
        raise UsageError(f"bits must be a whole number from 1 to {MOST_BITS}, got {bits!r}")
    if codes not in get_args(Codes):
        raise UsageError(f"codes must be one of {', '.join(get_args(Codes))}, got {codes!r}")
    if not tensor.numel() or not torch.isfinite(tensor).all():
        raise UsageError(f"a tensor of shape {tuple(tensor.shape)} is empty or has entries that are not finite")
    exact = tensor.detach().cpu().double().flatten().numpy()
    if codes == "lloyd":
        offset, scale = float(np.float32(exact.mean())), float(np.float32(exact.std()))
        middle = lloyd_codes(bits)
        edges = (middle[1:] + middle[:-1]) / 2
        standard = (exact - offset) / scale if scale > 0 else np.zeros_like(exact)
        found = np.searchsorted(edges, standard)
    else:
        offset = float(np.float32(exact.min()))
        scale = float(np.float32((exact.max() - offset) / (2**bits - 1)))
        found = np.rint((exact - offset) / scale) if scale > 0 else np.zeros_like(exact)
        found = found.clip(0, 2**bits - 1)
    packed = torch.from_numpy(pack(found.astype(np.uint8), bits))
    return Quantised(packed, tuple(tensor.shape), bits, codes, scale, offset)
