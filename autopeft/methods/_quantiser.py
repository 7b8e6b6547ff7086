"""Matrices that act as codes of a few bits of themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from autopeft.core.budget import Cost
from autopeft.errors import UsageError
from autopeft.methods.codes import MOST_BITS, lloyd_codes, pack, unpack

__all__ = ["Quantiser", "bit_cost", "check_bits"]

_SMALL = 1e-5
"""What the paper adds to the deviation before it divides by it."""

_SCALES_BYTES = 8


def check_bits(method: str, bits: int) -> None:
    """Whether codes have that many bits.

    Raises:
        UsageError: when they have not.
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= MOST_BITS:
        raise UsageError(f"{method}: bits must be a whole number from 1 to {MOST_BITS}, got {bits!r}")


def bit_cost(bits: int, counts: Sequence[int], entries: int) -> Cost:
    """What `Quantiser.packed` writes: per matrix two 32-bit floats and the codes in whole bytes.

    Args:
        bits: bits per code.
        counts: entries of each matrix.
        entries: entries of the model's tensors that the option changes.
    """
    written = sum(_SCALES_BYTES + -(-bits * n // 8) for n in counts)
    return Cost(sum(counts), written, 8 * written, entries)


class Quantiser(nn.Module):
    """Gives matrices the values of their codes, and packs them.

    "Revisiting the Parameter Efficiency of Adapters from the Perspective of Precision Redundancy" (arXiv 2307.16867,
    section 3.3). A matrix w with mean m and deviation s acts as `q s + m`, q the `lloyd_codes` value nearest to
    `(w - m) / (s + 1e-5)`. In the backward pass q counts as that quotient itself (straight-through), and m and s stay
    in the graph. The deviation has divisor n, the released code's n - 1, which a matrix of one entry does not survive.

    Means and deviations are summed in float64 and rounded to float32, and codes are always found in float32: a matrix
    has the same codes on every device, with every number of threads, and in a float64 copy that is merged.

    After `load`, a matrix acts as what was loaded for as long as nothing changes it, because mean and deviation of the
    coded values are not those of the original. Once training moves it, codes, mean and deviation are its own again;
    it starts from the coded values, shifted and stretched to the original mean and deviation.

    Args:
        bits: bits per code, 1 to 8.
    """

    table: Tensor
    edges: Tensor

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits
        codes = lloyd_codes(bits).astype(np.float32)
        self.register_buffer("table", torch.from_numpy(codes), persistent=False)
        self.register_buffer("edges", torch.from_numpy((codes[1:] + codes[:-1]) / 2), persistent=False)
        self._loaded: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        """Name to the matrix as `load` left it, its codes, and its mean and deviation."""

    def forward(self, name: str, matrix: Tensor) -> Tensor:
        """The matrix as it acts, of its own shape and dtype.

        Args:
            name: name of the matrix in its adapter.
            matrix: the trained matrix.
        """
        mean, deviation = _moments(matrix)
        standard = (matrix - mean) / (deviation + _SMALL)
        codes, scales = self._codes(name, matrix)
        # The added differences are exactly zero; they carry the gradients.
        value = self.table[codes].to(matrix.dtype) + (standard - standard.detach())
        mean = scales[0].to(matrix.dtype) + (mean - mean.detach())
        deviation = scales[1].to(matrix.dtype) + (deviation - deviation.detach())
        return value * deviation + mean

    def packed(self, matrices: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The matrices as the exported file holds them: one tensor, since each adds to the file's header.

        Returns:
            `packed`, uint8 of one dimension: per matrix its mean and deviation as little-endian float32, then its codes
            as `pack` writes them, rows first.
        """
        parts: list[bytes] = []
        for name, matrix in matrices.items():
            codes, scales = self._codes(name, matrix)
            parts.append(scales.cpu().numpy().astype("<f4").tobytes())
            parts.append(pack(codes.cpu().numpy().astype(np.uint8).reshape(-1), self.bits).tobytes())
        return {"packed": torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.uint8)}

    def load(self, matrices: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
        """Take up what `packed` gave for the same matrices.

        Raises:
            UsageError: for a missing, unknown or misshapen tensor.
        """
        lengths = [-(-self.bits * matrix.numel() // 8) for matrix in matrices.values()]
        wanted = {"packed": (torch.uint8, (sum(lengths) + _SCALES_BYTES * len(lengths),))}
        given = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        if given != wanted:
            raise UsageError(
                f"{self.bits}-bit codes of {', '.join(matrices)} are {_listed(wanted)}; the file has {_listed(given)}"
            )
        left = tensors["packed"].cpu().numpy()
        for (name, matrix), length in zip(matrices.items(), lengths, strict=True):
            row, coded, left = np.split(left, [_SCALES_BYTES, _SCALES_BYTES + length])
            scales = torch.from_numpy(np.frombuffer(row.tobytes(), "<f4").astype(np.float32)).to(matrix.device)
            codes = torch.from_numpy(unpack(coded, self.bits, matrix.numel()).astype(np.int64))
            codes = codes.view(matrix.shape).to(matrix.device)
            values = self.table[codes].double()
            spread = values.std(correction=0)
            stretch = torch.where(spread > 0, scales[1] / spread, 0.0)
            with torch.no_grad():
                matrix.copy_(((values - values.mean()) * stretch + scales[0]).float())
            self._loaded[name] = (matrix.detach().clone(), codes, scales)

    def _codes(self, name: str, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Codes, int64 of the matrix's shape, and mean and deviation, float32 of shape (2,)."""
        now = matrix.detach()
        if name in self._loaded:
            before, codes, scales = (t.to(now.device) for t in self._loaded[name])
            if torch.equal(before.to(now.dtype), now):
                self._loaded[name] = (before, codes, scales)
                return codes, scales
            del self._loaded[name]
        mean, deviation = (moment.float() for moment in _moments(now))
        standard = (now.float() - mean) / (deviation + _SMALL)
        return torch.bucketize(standard, self.edges.float()), torch.stack((mean, deviation))


def _moments(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation, rounded to float32, in the dtype of the matrix, with gradient."""
    wide = matrix.double()
    mean, deviation = wide.mean(), wide.std(correction=0)
    return mean.float().to(matrix.dtype), deviation.float().to(matrix.dtype)


def _listed(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> str:
    return ", ".join(f"{name} {dtype} {shape}" for name, (dtype, shape) in tensors.items()) or "nothing"
