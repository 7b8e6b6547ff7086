"""Files that are either the old content or the new, never half of it."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from autopeft.errors import CorruptFile, StoreError

__all__ = ["read_json", "replacing", "write_bytes", "write_json", "write_text"]


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` to write to; on a clean exit it takes `path`'s name, on an error it goes.

    The file and its folder are flushed to the disk, so that after a power cut the name holds one of the two contents.
    Missing parent folders are made.

    Args:
        path: the file to replace.

    Raises:
        StoreError: when the folder cannot be made or written to, or the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _flush_folder(path.parent)
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Replace the content of `path` by `data`, see `replacing`."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Replace the content of `path` by `text` in UTF-8, see `replacing`."""
    write_bytes(path, text.encode())


def write_json(path: Path, data: Any) -> None:
    """Replace the content of `path` by plain data as indented JSON, see `replacing`.

    Raises:
        ValueError: for NaN or infinity, which JSON has no word for (`autopeft.core.codec.encode` writes them as text).
        TypeError: for data that is not plain.
    """
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """The plain data in a JSON file.

    Raises:
        StoreError: when the file does not exist or cannot be opened.
        CorruptFile: naming the path, when it is not JSON in UTF-8.
    """
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror or error}") from error
    except json.JSONDecodeError as error:
        raise CorruptFile(f"{path} is not valid JSON: {error.msg} at line {error.lineno}") from error
    except UnicodeDecodeError as error:
        raise CorruptFile(f"{path} is not text in UTF-8: {error.reason} at byte {error.start}") from error


def _flush_folder(folder: Path) -> None:
    # Some file systems cannot open or sync a folder; the rename is atomic there all the same.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
