"""The seal on the test split: it opens once per run folder."""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path

from autopeft.errors import StoreError

__all__ = ["MARKER", "Seal"]

MARKER = "test_unsealed.json"
"""Name of the file that remembers, in the run folder, that the test split was opened."""


class Seal:
    """Remembers, on disk when there is a folder, that the test split was opened.

    Args:
        folder: the run folder; None remembers for the life of this object only.
        token: whoever shows the token that the marker was written with may open again: a finish that was cut off
            goes on under its token. None may open exactly once.
    """

    def __init__(self, folder: Path | None, token: str | None = None) -> None:
        self._marker = None if folder is None else folder / MARKER
        self._token = token
        self.is_open = False

    def open(self) -> None:
        """Break the seal.

        Raises:
            StoreError: when it was broken before under another token, or without one, in this process or another.
        """
        if self._marker is None:
            if self.is_open and self._token is None:
                raise StoreError("the test split of this task was opened before; it opens once")
        elif not self._write():
            self._check_token()
        self.is_open = True

    def check(self) -> None:
        """Refuse access while the seal is whole.

        Raises:
            StoreError: before `open`.
        """
        if not self.is_open:
            raise StoreError("the test split is sealed; call unseal_test() once, when everything else is decided")

    def _write(self) -> bool:
        assert self._marker is not None
        draft = self._marker.with_name(f".{MARKER}.{os.getpid()}.{secrets.token_hex(4)}")
        content = json.dumps({"schema": "autopeft.unsealed/1", "token": self._token, "pid": os.getpid()})
        try:
            self._marker.parent.mkdir(parents=True, exist_ok=True)
            draft.write_text(content + "\n", encoding="utf-8")
            try:
                # A hard link appears whole or not at all, and of two processes only one succeeds.
                os.link(draft, self._marker)
            except FileExistsError:
                return False
            except OSError:
                return self._write_exclusively(content)
            finally:
                draft.unlink(missing_ok=True)
        except OSError as error:
            raise StoreError(f"cannot write {self._marker}: {error.strerror or error}") from error
        return True

    def _write_exclusively(self, content: str) -> bool:
        """For file systems without hard links."""
        assert self._marker is not None
        try:
            with self._marker.open("x", encoding="utf-8") as file:
                file.write(content + "\n")
        except FileExistsError:
            return False
        return True

    def _check_token(self) -> None:
        assert self._marker is not None
        try:
            data = json.loads(self._marker.read_text(encoding="utf-8"))
            token = data["token"]
        except (OSError, ValueError, KeyError, TypeError):
            token = None
        if self._token is None or token != self._token:
            raise StoreError(
                f"the test split was opened before ({self._marker} exists); it opens once per run folder. "
                "Start a new run folder to judge another choice"
            )
