"""Two frozen matrices that an option's change lies between, where they cannot be computed again."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

__all__ = ["Bases"]


@dataclass(frozen=True, slots=True, eq=False)
class Bases:
    """The frozen factors of a change `left M right^T`, chosen from data when the plan was made.

    A plan carries them, as it carries the entries of sparse options: whoever trains it again has the same ones, bit for
    bit, without the data.

    Attributes:
        left: a numpy float32 array of shape (out_features, a).
        right: a numpy float32 array of shape (in_features, b).

    Raises:
        ValueError: for arrays of another type or number of dimensions.
    """

    left: Any
    right: Any

    def __post_init__(self) -> None:
        for name in ("left", "right"):
            array = getattr(self, name)
            if array.ndim != 2 or array.dtype.kind != "f" or array.dtype.itemsize != 4:
                raise ValueError(f"{name} bases must be a 2-D float32 array, got {array.dtype} of {tuple(array.shape)}")
            array.setflags(write=False)

    @property
    def sha256(self) -> str:
        """Digest of shapes and values, as little-endian float32 in row order."""
        digest = hashlib.sha256()
        for array in (self.left, self.right):
            digest.update(repr(tuple(array.shape)).encode() + array.astype("<f4").tobytes())
        return digest.hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Bases) and self.sha256 == other.sha256

    def __hash__(self) -> int:
        return hash(self.sha256)
