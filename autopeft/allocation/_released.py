"""Reading the released SPT files without running anything that is in them.

The files are torch zip archives of a pickle that names classes of torch and numpy. Here every name on an explicit list
stands for a small function of this module that builds plain numbers, tuples and numpy arrays; any other name is refused
before anything is called. torch is not needed.
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from autopeft.errors import CorruptFile

__all__ = ["load"]

_MAX_BYTES = 256 << 20
"""Largest unpacked size that is read: the released files have up to 12 MB."""

_DAMAGE = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    zlib.error,
    AttributeError,
    EOFError,
    ImportError,
    IndexError,
    KeyError,
    MemoryError,
    NotImplementedError,
    OverflowError,
    RecursionError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What damaged archives and pickles raise."""


def load(path: Path) -> Any:
    """The object in a torch zip archive: dicts, lists, numbers, strings, tuples for sizes, numpy arrays for tensors.

    Raises:
        CorruptFile: when the file is not such an archive, is damaged, or names anything that is not on the list.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(info.file_size for info in archive.infolist()) > _MAX_BYTES:
                raise CorruptFile(f"{path} unpacks to more than {_MAX_BYTES:,} bytes; it is no SPT allocation")
            pickles = [name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl"]
            if len(pickles) != 1:
                raise CorruptFile(f"{path} is a zip archive, but not one that torch wrote: it has no data.pkl")
            folder = pickles[0].rpartition("/")[0]
            return _Unpickler(path, archive, f"{folder}/data" if folder else "data", archive.read(pickles[0])).load()
    except OSError as error:
        raise CorruptFile(f"cannot read {path}: {error.strerror or error}") from error
    except _DAMAGE as error:
        raise CorruptFile(f"{path} is damaged or no SPT allocation: {error}") from error


class _Unpickler(pickle.Unpickler):
    """Builds nothing but what `_BUILDERS` lists."""

    def __init__(self, path: Path, archive: zipfile.ZipFile, folder: str, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        self._path = path
        self._archive = archive
        self._folder = folder

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _BUILDERS:
            raise CorruptFile(
                f"{self._path} asks for {module}.{name}, which no SPT allocation holds; refused, nothing of it was run"
            )
        return _BUILDERS[module, name]

    def persistent_load(self, pid: Any) -> Any:
        kind, storage, key, _, n = pid
        if kind != "storage" or not isinstance(storage, _Storage) or not str(key).isalnum():
            raise CorruptFile(f"{self._path} refers to {pid!r}, which is not a tensor's storage")
        values = np.frombuffer(self._archive.read(f"{self._folder}/{key}"), dtype=storage.dtype)
        if len(values) != n:
            raise CorruptFile(f"{self._path}: storage {key} should hold {n} values, it holds {len(values)}")
        return values


class _Storage:
    """Stands for torch's typed storages."""

    __slots__ = ("dtype",)

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype

    def __call__(self, *_: Any) -> NoReturn:
        raise CorruptFile("a pickle that calls a storage is no SPT allocation")


class _Dtype:
    """Stands for numpy's dtype of 64-bit integers, the only one in these files."""

    __slots__ = ()

    def __init__(self, code: str, *_: Any) -> None:
        if code != "i8":
            raise CorruptFile(f"expected integers of 8 bytes, found numpy type {code!r}")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] != "<":
            raise CorruptFile(f"expected little-endian integers, found byte order {state[1]!r}")


def _tensor(storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Any:
    count = math.prod(size)
    expected = tuple(math.prod(size[i + 1 :]) for i in range(len(size)))
    if tuple(stride) != expected or offset < 0 or offset + count > len(storage):
        raise CorruptFile(f"a tensor of size {tuple(size)} and stride {tuple(stride)} does not lie in its storage")
    return storage[offset : offset + count].reshape(size)


def _scalar(dtype: Any, data: bytes) -> int:
    if not isinstance(dtype, _Dtype) or len(data) != 8:
        raise CorruptFile("expected an integer of 8 bytes")
    return int.from_bytes(data, "little", signed=True)


def _size(values: Any = ()) -> tuple[int, ...]:
    if not all(isinstance(v, int) and v >= 0 for v in values):
        raise CorruptFile(f"a size must hold whole numbers of at least 0, found {values!r}")
    return tuple(values)


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise CorruptFile(f"expected bytes written as latin1, found {encoding!r}")
    return text.encode("latin1")


def _hooks(*_: Any) -> dict[Any, Any]:
    return {}


_BUILDERS: Mapping[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch", "Size"): _size,
    ("torch", "LongStorage"): _Storage("<i8"),
    ("torch", "FloatStorage"): _Storage("<f4"),
    ("collections", "OrderedDict"): _hooks,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy._core.multiarray", "scalar"): _scalar,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
}
"""The allow-list: what these files name, and what is called instead."""
